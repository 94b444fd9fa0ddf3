"""`vpo init` writes recipes that `vpo plan` accepts, and says what has to be downloaded."""

import io
import itertools
import re
from pathlib import Path

import pytest
import yaml

from vpo_ray import cli
from vpo_ray.cli.init_recipe import REWARDS, Choices, recipe_text
from vpo_ray.recipe import Recipe, load, parse, video_presets


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return tmp_path


def init(*words: str) -> int:
    return cli.main(["init", *words])


def test_a_recipe_by_options_is_planned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "q.txt").write_text("a cat\na dog on a bike\nrain\n", "utf-8")
    options = ["--video", "ltx-video", "--judge", "gpt-4o", "--reward", "vbench", "--gpus", "4"]
    assert (
        init("mine.yaml", *options, "--queries", "q.txt", "--policy", "org/llm", "--out", "s3://b/run") == 0
    )
    told = capsys.readouterr().out
    recipe = load("mine.yaml")
    assert (recipe.name, recipe.out, recipe.policy.model) == ("mine", "s3://b/run", "org/llm")
    assert recipe.render.frames == video_presets()["ltx-video"]["settings"]["frames"]
    assert (recipe.judge.backend, recipe.reward.kind) == ("openai", "vbench")
    assert "render.model: https://huggingface.co/Lightricks/LTX-Video (size not known, licence: LTX" in told
    assert "policy.model: https://huggingface.co/org/llm" in told
    assert "gpt-4o" not in told, "nothing of an endpoint is downloaded"
    assert cli.main(["plan", "mine.yaml", "--out", "run", "--gpus", "4", "--gpu-type", "H100"]) == 0
    assert re.findall(r"^(\w+) .* (\d+) +\S+ +\d", capsys.readouterr().out, re.MULTILINE)


def test_a_recipe_in_a_folder_finds_its_examples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "q.txt").write_text("a cat\na dog on a bike\nrain\n", "utf-8")
    (here / "my recipes").mkdir()
    options = ["--video", "http", "--judge", "gpt-4o", "--reward", "vbench", "--gpus", "1"]
    assert init("my recipes/mine.yaml", *options, "--queries", "q.txt") == 0
    told = capsys.readouterr().out
    assert "draft.examples" not in told, "they were written"
    assert "vpo plan 'my recipes/mine.yaml'" in told
    assert cli.main(["plan", "my recipes/mine.yaml"]) == 0, capsys.readouterr()


def test_on_a_terminal_it_asks_for_what_no_option_says(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = io.StringIO("users.csv\n\nQwen/Qwen3-8B\n\n4\n")
    answers.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", answers)
    assert init("--video", "wan2.1-1.3b") == 0
    assert "Video model" not in capsys.readouterr().err
    recipe = load("recipe.yaml")
    assert (recipe.queries.path, recipe.policy.model) == ("users.csv", "Qwen/Qwen2.5-7B-Instruct")
    assert (recipe.judge.model, recipe.reward.kind) == ("Qwen/Qwen3-8B", "visionreward")


def test_every_choice_is_a_recipe_that_fits_its_gpus() -> None:
    choices = itertools.product([*video_presets(), "http"], REWARDS, ("org/judge", "gpt-4o"), (4, 5, 16))
    for number, (video, reward, judge, gpus) in enumerate(choices):
        made = Choices("n", "runs/n", "q.txt", video, "org/p", judge, reward, gpus)
        if number % 7 == 0 or video == "http":  # every value of each beside every other's
            recipe = loaded(recipe_text(made))
            pools = (recipe.sample.pool, recipe.judge.pool, recipe.render.pool, recipe.reward.pool)
            assert sum(pool.size[1] * pool.num_gpus for pool in pools) == gpus
            for phase in (recipe.sft, recipe.dpo):
                assert phase is not None
                assert phase.workers <= gpus
                assert phase.global_batch % (phase.micro_batch * phase.workers) == 0


def loaded(text: str) -> Recipe:
    return parse(yaml.safe_load(text), "made")


def test_what_was_published_is_listed_with_licence_and_size(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("--policy", "meta-llama/Meta-Llama-3-8B-Instruct", "--models", "weights") == 0
    told = capsys.readouterr().out
    assert "about 16.1 GB, licence: Meta Llama 3 Community, gated" in told
    assert "reward.model: https://huggingface.co/zai-org/VisionReward-Video (about 25 GB" in told
    assert "reward.checklist.weights: made of VisionReward_video_qa.txt" in told
    assert "to bring: queries.path: queries.jsonl" in told
    assert (here / "sft_examples.jsonl").is_file()
    assert load("recipe.yaml").reward.model == "./weights/VisionReward-Video", "no hub id"


def test_the_laptops_example_and_what_makes_its_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--example", "laptop") == 0
    assert "vpo world runs/world" in capsys.readouterr().out
    assert load("recipe.yaml") == load("laptop")
    assert sorted(path.name for path in here.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "2"], "--gpus 2: sample, judge, render, reward take a GPU each"),
        (["--video", "sora"], "--video sora: no such preset; there are cogvideox-2b"),
        (["--example", "lap"], "--example lap: no such recipe; there are"),
        (["there.yaml"], "there.yaml is there already"),
        (["file/recipe.yaml"], "cannot write file/recipe.yaml"),
    ],
)
def test_what_cannot_be_is_told(
    here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "there.yaml").write_text("mine", "utf-8")
    (here / "file").write_text("", "utf-8")
    assert init(*words) == 2
    assert message in capsys.readouterr().err
    assert (here / "there.yaml").read_text("utf-8") == "mine"
