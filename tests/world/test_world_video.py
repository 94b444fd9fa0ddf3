"""The world's video models: what was shipped does what its figures say, and training learns."""

import json
import re
import shutil

import pytest

from vpo_ray.world.make import complete_video
from vpo_ray.world.train import WEIGHTS

pytestmark = pytest.mark.engine

CLIPS = 30


@pytest.fixture(scope="module")
def measured():
    from vpo_ray.world.train_video import video_figures

    return video_figures(WEIGHTS / "video", CLIPS, seed=11, queries=10)


@pytest.fixture(scope="module")
def noted():
    return json.loads((WEIGHTS / "figures.json").read_text("utf-8"))["video"]


@pytest.mark.parametrize("name", ["colour", "shape", "motion", "place", "look", "whole"])
def test_shipped_weights_reach_their_figures_on_held_out_captions(name, measured, noted):
    # Three standard errors of a share of so many clips.
    error = 3 * (max(noted[name] * (1 - noted[name]), 0.02) / CLIPS) ** 0.5
    assert measured[name] >= noted[name] - error


def test_a_users_query_gives_less_than_a_careful_caption(measured):
    assert measured["truth_of_captions"] - measured["truth_of_queries"] > 0.15


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The other video model, with the VAE that it shares with the first."""
    folder = tmp_path_factory.mktemp("world") / "other_video"
    shutil.copytree(WEIGHTS / "other_video", folder)
    complete_video(folder)
    return folder


def test_the_other_model_reaches_its_figures_by_captions_of_its_own_style(other):
    from vpo_ray.world.other_language import OTHER_STYLE
    from vpo_ray.world.train_video import video_figures

    measured = video_figures(other, 20, seed=11, queries=0, style=OTHER_STYLE)
    noted = json.loads((WEIGHTS / "figures.json").read_text("utf-8"))["other_video"]
    for name in ("colour", "motion", "place", "look", "whole"):
        error = 3 * (max(noted[name] * (1 - noted[name]), 0.02) / 20) ** 0.5
        assert measured[name] >= noted[name] - error, name


def test_the_weights_of_the_world_are_small():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 16 * 10**6


@pytest.mark.parametrize("model", ["video", "other_video"])
def test_no_caption_is_longer_than_the_text_encoder_takes(model):
    import numpy as np
    from transformers import AutoTokenizer

    from vpo_ray.world.language import STYLE
    from vpo_ray.world.other_language import OTHER_STYLE
    from vpo_ray.world.scene import scenes
    from vpo_ray.world.train_video import TEXT_TOKENS

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / model / "tokenizer")
    rng = np.random.default_rng(0)
    styles = [STYLE] if model == "video" else [STYLE, OTHER_STYLE]
    texts = [style.caption(scene, rng) for style in styles for scene in scenes(held_out=True)]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= TEXT_TOKENS


@pytest.mark.slow
def test_a_minute_of_training_sees_the_loss_fall(tmp_path, caplog):
    from vpo_ray.world.muon import Budget
    from vpo_ray.world.train_vae import train_vae
    from vpo_ray.world.train_video import fit_video

    with caplog.at_level("INFO"):
        vae = train_vae(Budget(41), Budget(1))
        fit_video(vae, tmp_path, text=Budget(101), denoiser=Budget(41), encoding_s=5)
    for part in ("vae 32px", "text", "denoiser"):
        losses = [float(x) for x in re.findall(rf"{part}: step \d+, loss ([\d.]+)", caplog.text)]
        assert losses[-1] < 0.9 * losses[0], part
    assert (tmp_path / "model_index.json").exists()
