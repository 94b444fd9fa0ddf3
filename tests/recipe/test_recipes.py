"""The shipped recipes load, hold the paper's numbers, and name only what a user replaces."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpo_ray.engines.reward import checklist
from vpo_ray.plan import PlanError, check_recipe
from vpo_ray.recipe import Pair, Recipe, RecipeError, load, result_keys, sources, video_presets
from vpo_ray.world.make import write_texts

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "jobs/recipes"
VPO = ("vpo_cogvideox_2b", "vpo_cogvideox_5b")
PAV = ("prompt_a_video_cogvideox", "prompt_a_video_wan")
VISIONREWARD = ROOT.parent / "shared/data/visionreward"
published = pytest.mark.skipif(
    not VISIONREWARD.exists(), reason="../shared/data/visionreward is not beside this checkout"
)


def vpo(name: str, **changes: Any) -> Recipe:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return load(RECIPES / f"{name}.yaml", [f"{key}={value}" for key, value in named.items()])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    recipe = load(path)
    assert recipe.sft is not None
    assert recipe.dpo is not None


def test_a_recipe_of_the_package_goes_by_its_bare_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("vpo_cogvideox_5b", ["seed=3"]) == load(RECIPES / "vpo_cogvideox_5b.yaml", ["seed=3"])
    (tmp_path / "tiny").mkdir()
    assert load("tiny").name == "tiny", "a folder is no recipe"
    (tmp_path / "laptop").write_text((RECIPES / "tiny.yaml").read_text("utf-8"), "utf-8")
    assert load("laptop").name == "tiny", "a file of that name goes before it"
    with pytest.raises(
        RecipeError, match=r"lapptop: no such file, and no recipe of the package.*laptop,.*tiny"
    ):
        load("lapptop")


def test_what_the_laptops_recipe_names_is_made_by_the_world(tmp_path: Path) -> None:
    """Outside a checkout too: nothing of it is a path into the package."""
    write_texts(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    named = [path for _, path in sources(load("laptop")) if not path.startswith("builtin:")]
    assert {path.rpartition("/")[0].partition("/world")[0] for path in named} == {"runs"}
    texts = {path.removeprefix("runs/world/") for path in named if path.count("/") == 2 and "." in path}
    assert texts == made


@pytest.mark.parametrize("name", VPO)
def test_the_numbers_of_the_paper(name: str) -> None:
    """VPO, arXiv 2503.20491, and its released training YAML."""
    recipe = vpo(name)
    assert recipe.policy.model == "meta-llama/Meta-Llama-3-8B-Instruct"
    sft, dpo, sample = recipe.sft, recipe.dpo, recipe.sample
    assert sft is not None
    assert dpo is not None
    assert (sft.lr, sft.epochs, sft.global_batch, sft.warmup_ratio) == (2e-6, 5, 64, 0.1)
    assert (sft.schedule, sft.adam_betas) == ("constant", (0.9, 0.999))
    assert (dpo.lr, dpo.beta, dpo.epochs, dpo.global_batch, dpo.warmup_ratio) == (5e-7, 0.1, 1, 16, 0.1)
    assert (dpo.schedule, dpo.loss, dpo.rpo_alpha) == ("linear", "sigmoid", 0)
    for phase in (sft, dpo):
        assert (phase.max_length, phase.dtype, phase.zero_stage, phase.workers) == (2048, "bfloat16", 3, 8)
        assert phase.global_batch % (phase.micro_batch * phase.workers) == 0
    assert (sample.k, sample.temperature, sample.top_p, sample.max_tokens) == (4, 0.9, 0.9, 2048)
    assert (recipe.reward.convention, recipe.reward.frame_strategy) == ("sum01", "chat")
    assert recipe.pair == Pair()
    assert (recipe.serve.temperature, recipe.serve.top_p, recipe.serve.max_tokens) == (0.7, 1.0, 1024)


@pytest.mark.parametrize("name", VPO)
def test_the_video_model_has_the_settings_of_its_authors(name: str) -> None:
    preset = video_presets()[name.removeprefix("vpo_").replace("_", "-")]["settings"]
    render = vpo(name).render.model_dump(mode="json")
    assert {key: render[key] for key in preset} == preset


@pytest.mark.parametrize("name", VPO + PAV)
def test_it_fits_eight_gpus(name: str) -> None:
    recipe = vpo(name)
    pools = (recipe.sample.pool, recipe.judge.pool, recipe.render.pool, recipe.reward.pool)
    assert sum(pool.size[1] * pool.num_gpus for pool in pools) == 8


def test_the_two_differ_in_the_video_model_only() -> None:
    small, large = (result_keys(vpo(name).dump()) for name in VPO)
    different = {key for key in small | large if small.get(key) != large.get(key)}
    assert {key for key in different if not key.startswith("render.")} == {"name"}


@pytest.mark.parametrize("name", PAV)
def test_the_numbers_of_prompt_a_video(name: str) -> None:
    """Prompt-A-Video, arXiv 2412.15156: booster/dpo and booster/finetuning of its code, and the defaults of
    llama-recipes and transformers where these give none."""
    recipe = vpo(name)
    sft, dpo, sample, formula = recipe.sft, recipe.dpo, recipe.sample, recipe.formula
    assert sft is not None
    assert dpo is not None
    assert formula is not None
    assert sft.lora is not None
    assert dpo.lora is not None
    assert (sft.epochs, sft.lr, sft.global_batch, sft.micro_batch, sft.workers) == (12, 1e-4, 8, 4, 2)
    assert (sft.lora.r, sft.lora.alpha, sft.lora.dropout) == (8, 32, 0.05)
    assert (sample.k, sample.temperature, sample.top_p, sample.top_k, sample.max_tokens) == (5, 1, 1, 50, 250)
    assert (dpo.epochs, dpo.lr, dpo.beta, dpo.global_batch, dpo.warmup_ratio) == (3, 5e-5, 0.1, 32, 0.1)
    assert (dpo.lora.r, dpo.lora.alpha, dpo.lora.dropout) == (16, 16, 0)
    assert len(dpo.lora.target_modules) == 7
    assert dpo.lora.merge, "a second round samples from it"
    assert (dpo.max_length, dpo.schedule, dpo.loss) == (1024, "linear", "sigmoid")
    for phase in (sft, dpo):
        assert phase.global_batch % (phase.micro_batch * phase.workers) == 0
    assert recipe.pair.by == "formula"
    assert {term: (of.weight, of.above) for term, of in formula.terms.items()} == {
        "reward.visual_quality": (1, 2.6),
        "reward.temporal_consistency": (1, 2.6),
        "reward.factual_consistency": (1, 2.55),
        "reward.dynamic_degree": (1.1, 2.65),
        "reward.text_alignment": (1.3, 2.9),
        "aesthetic": (0.8, 5.5),
        "mps": (1 / 3, 8.5),
    }
    kinds = [reward.kind for reward in (recipe.reward, *recipe.more_rewards.values())]
    for kind, known in zip(kinds, ("videoscore", "laion_aesthetic", "mps"), strict=True):
        assert known in kind


def test_those_of_prompt_a_video_differ_in_the_video_model_only() -> None:
    first, second = (result_keys(vpo(name).dump()) for name in PAV)
    different = {key for key in first | second if first.get(key) != second.get(key)}
    assert {key for key in different if not key.startswith("render.")} == {"name"}


def bare_values(name: str, section: str) -> list[str]:
    """The lines of a section with a value and neither a comment nor a source that covers them."""
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    body = re.search(rf"^{section}:\n((?:  .*\n)+)", text, re.MULTILINE)
    assert body is not None
    # "as the rest" and "as all pools" stand for the lines after them.
    lines = body[1].split("as the rest")[0].splitlines()
    bare = [line for line in lines if re.match(r"  \w+: [\w.{\[]", line) and "#" not in line]
    return [line for line in bare if not line.startswith("  data:")]


@pytest.mark.parametrize("name", VPO)
def test_every_number_has_a_source(name: str) -> None:
    """A value of SFT, sampling, judging, pairing or DPO has a comment, or a source that covers it."""
    for section in ("sft", "sample", "dpo", "pair"):
        assert bare_values(name, section) == []


@pytest.mark.parametrize("name", PAV)
def test_every_number_of_prompt_a_video_has_a_source(name: str) -> None:
    for section in ("sft", "sample", "dpo"):
        assert bare_values(name, section) == []


@pytest.mark.parametrize("name", VPO)
def test_a_plan_asks_for_what_the_user_has_to_bring(name: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_recipe(vpo(name))
    keys = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert keys == ["reward.model", "reward.checklist.questions", "reward.checklist.weights", "sft.data"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The published files, and the weights made of them as the recipe says."""
    for path in VISIONREWARD.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (RECIPES / f"{VPO[0]}.yaml").read_text("utf-8")
    [line] = re.findall(r"# (python -c .*)", text)
    subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, check=True, timeout=20)
    return tmp_path


@published
@pytest.mark.parametrize("name", VPO)
def test_the_published_checklist_scores_as_published(name: str, files: Path) -> None:
    """Maxima: VisionReward paper, tables 17 and 18; sum of weights 6.2771726."""
    settings = vpo(
        name,
        reward__checklist__questions=files / "VisionReward_video_qa.txt",
        reward__checklist__weights=files / "weight_64.json",
    ).reward.checklist
    made = checklist.load_checklist(settings)
    assert len(made.questions) == 64
    assert [q.weight for q in made.questions if q.weight] == json.loads(
        (files / "weight.json").read_text("utf-8")
    )
    score, dimensions = made.score([True] * 64, "sum01")
    assert score == pytest.approx(6.2771726)
    assert {name: round(value, 4) for name, value in dimensions.items()} == {
        "alignment": 2.3486,
        "composition": 0.0602,
        "stability": 0.4202,
        "quality": 0.8189,
        "preservation": 0.8647,
        "dynamic": 0.1634,
        "fidelity": 1.2069,
        "physics": 0.3942,
        "safety": 0.0,
    }


@published
@pytest.mark.parametrize("name", VPO)
def test_with_these_files_the_recipe_is_complete(name: str, files: Path, tiny_models: Path) -> None:
    check_recipe(
        vpo(
            name,
            reward__model=tiny_models / "reward",
            reward__checklist__questions=files / "VisionReward_video_qa.txt",
            reward__checklist__weights=files / "weight_64.json",
            sft__data=ROOT / "vpo_ray/data/sft.jsonl",
        )
    )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_key_stands_for_itself_only(path: Path) -> None:
    """Every key that a recipe gives is in what it resolves to: no dead text."""
    given = yaml.safe_load(path.read_text("utf-8"))
    resolved = load(path).dump()
    assert given.keys() <= resolved.keys()
    for section, keys in given.items():
        if isinstance(keys, dict):
            assert keys.keys() <= resolved[section].keys()
