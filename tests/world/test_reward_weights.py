"""The small world's reward: the right answers, the training, and the weights that are shipped."""

import json

import numpy as np
import pytest
import torch

from vpo_ray.engines.reward import build
from vpo_ray.world import train_reward
from vpo_ray.world.draw import draw_clip
from vpo_ray.world.questions import CHECKS, answers, view
from vpo_ray.world.reward_clips import drawn, rendered
from vpo_ray.world.reward_figures import answer_figures, settings
from vpo_ray.world.scene import NAMED, Scene, scenes
from vpo_ray.world.train import WEIGHTS

SCENE = Scene("red", "ball", "large", "right", "night")
NAMES = {name: getattr(SCENE, name) for name in NAMED}


def answered(clip, named):
    return {c.key: a for c, a in zip(CHECKS, answers(view(clip), named), strict=True)}


def test_a_drawn_clip_gets_yes_to_all_that_was_asked():
    assert set(answered(draw_clip(SCENE, np.random.default_rng(0)), NAMES).values()) == {True}


@pytest.mark.parametrize(
    ("name", "other"), [("colour", "blue"), ("shape", "pole"), ("motion", "up"), ("place", "sea")]
)
def test_what_is_not_as_asked_gets_a_no_and_what_is_not_named_a_yes(name, other):
    clip = draw_clip(SCENE, np.random.default_rng(0))
    assert answered(clip, NAMES | {name: other})[name] is False
    assert answered(clip, {})[name] is True


def test_a_clip_without_a_thing_is_clear_and_nothing_else():
    clip = draw_clip(SCENE, np.random.default_rng(0))
    empty = np.repeat(clip[:, :, :4], 16, axis=2)
    found = answered(empty, NAMES)
    assert {key for key, yes in found.items() if yes} == {"place", "clear"}


@pytest.mark.engine
@pytest.mark.slow
def test_training_sees_the_loss_fall_and_what_is_saved_loads(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = train_reward.start(tmp_path)
    heads, clips = train_reward.Heads(model), drawn(16, 0, scenes(held_out=False))
    reader = train_reward.Reader(tokenizer, model.config, 0)
    train_reward.learn_frames(model, heads, clips, 2, 0)
    losses = train_reward.learn_answers(model, heads, reader, [clips], 8)
    torch.set_num_threads(threads)
    train_reward.save_reward(model, tmp_path)
    assert build(settings(tmp_path)).model.config == model.config
    assert losses[-1] < losses[0]


@pytest.mark.engine
def test_the_shipped_weights_reach_their_figures():
    noted = json.loads((WEIGHTS / "figures.json").read_text("utf-8"))["reward"]
    found = answer_figures(WEIGHTS / "reward", rendered(WEIGHTS / "video", 10, 5, scenes(held_out=True)))
    assert found["right"] > noted["right"] - 0.05
    assert found["preferred"] > noted["preferred"] - 0.15
