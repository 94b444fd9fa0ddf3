"""Rewards, video models and chat engines of others: what a recipe may name, and what it is refused for."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.cli.doctor import asked
from vpo_ray.engines import reward as rewards
from vpo_ray.engines import video
from vpo_ray.engines.endpoint.account import Account
from vpo_ray.loop.opening import OtherRecipeError, open_run
from vpo_ray.plan import PlanError, check_recipe
from vpo_ray.recipe import (
    ChatModel,
    Judge,
    Recipe,
    RecipeError,
    Render,
    RenderGate,
    Reward,
    load,
    parse_stored,
    plugins,
)
from vpo_ray.recipe.plugins import BUILT_IN, PluginError
from vpo_ray.stages import made_with
from vpo_ray.stages.draft import draft_key
from vpo_ray.stages.render import Renderer

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
MODULE = """
from pydantic import BaseModel, Field
from vpo_ray.recipe.base import Source
class Model:
    class Options(BaseModel):
        level: int = Field(1, gt=0)
    def __init__(self, settings, options):
        self.settings, self.options = settings, options
        if options.level == 13:
            raise OSError("no such weights")
    def score(self, videos, queries): ...
    async def complete(self, messages, sampling, schema=None): ...
    def render(self, prompts, seeds): ...
    animate_files = warm_up = cut = stored = render
class Bare:
    Options = BaseModel
class Reads(Model):
    checkpoints = ("model", "clip")
    class Options(BaseModel):
        level: int = 1
        clip: Source
        words: Source = ""
class Loaded(Model):
    version = "weights-7"
    @staticmethod
    def identity(settings, options):
        return f"level {options.level}"
"""

KINDS = (*Reward.known, *BUILT_IN["vpo_ray.rewards"])

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package `others` with a module and entry points on Python's path."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load_builder.cache_clear()

    def put(version: str | None = "1.2", text: str = MODULE, points: str = "", name: str = "others") -> Path:
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
        if version is not None:
            info = tmp_path / f"{name}_models-1.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}-models\nVersion: {version}\n", "utf-8"
            )
            (info / "top_level.txt").write_text(name, "utf-8")
            (info / "entry_points.txt").write_text(points, "utf-8")
        sys.modules.pop(name, None)
        plugins.load_builder.cache_clear()
        return tmp_path

    yield put
    for name in set(sys.modules) - before:
        if name.startswith("others"):
            del sys.modules[name]
    plugins.load_builder.cache_clear()


def tiny(*sets: str) -> Recipe:
    return load(TINY, sets)


REWARD = "reward={kind: 'others:Model', options: {level: 2}}"


def test_names_that_the_package_knows_are_those_that_it_has() -> None:
    assert tuple(rewards.KINDS) == Reward.known
    assert tuple(video.KINDS) == Render.known


def test_a_recipe_has_the_builder_and_its_version_written_into_it(install: Install) -> None:
    install(points="[vpo_ray.rewards]\nbright = others:Model\n")
    by_target = tiny(REWARD)
    assert by_target.reward.kind == "others:Model@1.2"
    assert tiny(REWARD.replace("others:Model", "bright")) == by_target
    assert parse_stored(by_target.dump(), "run") == by_target
    install("1.3")
    assert tiny(REWARD).fingerprint() != by_target.fingerprint()
    assert tiny("seed=8", REWARD.replace("2", "3")).fingerprint() != tiny("seed=8", REWARD).fingerprint()


def test_a_module_of_no_package_has_its_text_for_a_version(install: Install) -> None:
    install(None)
    first = tiny(REWARD).reward.kind
    assert len(first.partition("@")[2]) == 12
    install(None, MODULE + "# changed")
    assert tiny(REWARD).reward.kind != first


def test_a_run_of_another_version_is_not_gone_on_with(install: Install, tmp_path: Path) -> None:
    install()
    at = REWARD, f"out={tmp_path / 'run'}"
    open_run(tiny(*at))
    open_run(tiny(*at))
    install("1.3")
    with pytest.raises(OtherRecipeError, match=r"reward.kind: 'others:Model@1.2' -> 'others:Model@1.3'"):
        open_run(tiny(*at))
    install(text="")
    with pytest.raises(OtherRecipeError, match=r"reward.kind: others:Model cannot be imported"):
        open_run(tiny(*at))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (
            "reward={kind: 'others:Model', options: {level: 0}}",
            "reward.options.level: Input should be greater",
        ),
        (
            "reward={kind: 'others:Model', options: {levl: 2}}",
            "reward.options.levl: unknown key; did you mean",
        ),
        ("more_rewards.two={kind: 'others:Model', options: {level: x}}", "more_rewards.two.options.level: "),
        ("reward={kind: 'no such:', model: m}", "reward.kind: 'no such:' is no name and no package.module"),
        ("render.options={a: 1}", "render: options has no effect with kind: diffusers"),
        ("judge.options={a: 1}", "judge: options has no effect with backend: vllm"),
        ("reward={kind: openai, checklist: {file: c}}", "reward.model: missing; add it"),
    ],
)
def test_a_recipe_is_refused_by_the_key(install: Install, sets: str, says: str) -> None:
    install()
    with pytest.raises(RecipeError) as refused:
        tiny(sets)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("visionrewrad", f"is no kind that is known here ({', '.join(KINDS)}, broken)"),
        ("broken", "others:gone cannot be imported: AttributeError"),
        ("nowhere.at_all:Model", "nowhere.at_all:Model cannot be imported: ModuleNotFoundError"),
        ("os:system", "os:system is no builder"),
        ("others:Bare", "others:Bare is no builder"),
        ("others:Model@1.1", "others:Model has version 1.2 here, and not 1.1"),
    ],
)
def test_what_is_not_here_is_a_problem_of_the_plan_and_not_of_reading(
    install: Install, kind: str, says: str
) -> None:
    install(points="[vpo_ray.rewards]\nbroken = others:gone\n")
    recipe = tiny(f"reward={{kind: '{kind}'}}", "pair.dominance=none")
    assert recipe.reward.kind == kind
    with pytest.raises(PlanError) as refused:
        check_recipe(recipe)
    [line] = [line for line in str(refused.value).splitlines() if "reward.kind" in line]
    assert line.strip().startswith("reward.kind: ")
    assert says in line


def test_a_name_that_two_packages_offer_is_refused(install: Install) -> None:
    install(points="[vpo_ray.rewards]\nbright = others:Model\n")
    install(points="[vpo_ray.rewards]\nbright = others2:Model\n", name="others2")
    with pytest.raises(PluginError, match="bright is offered by others"):
        plugins.find(Reward(kind="bright"))


def test_a_reward_without_a_checklist_cannot_be_compared_by_question(install: Install) -> None:
    install()
    with pytest.raises(PlanError, match=r"pair\.dominance: question needs a checklist, reward has none"):
        check_recipe(tiny(REWARD, "pair.dominance=question"))


def test_the_model_that_is_built_has_the_section_and_its_options(install: Install) -> None:
    install()
    settings = tiny(REWARD).reward
    model: Any = rewards.build(settings)
    assert (model.settings, model.options.level) == (settings, 2)
    with pytest.raises(PluginError, match=r"others:Model@1.2: OSError: no such weights") as refused:
        rewards.build(settings.model_copy(update={"options": {"level": 13}}))
    assert refused.value.stops_run


def test_a_videos_key_follows_builder_version_options_and_identity(install: Install, tmp_path: Path) -> None:
    install()
    row = {"candidate_id": "c", "query_id": "q", "prompt": "a cat", "verdict": "aligned", "error": None}

    def key(**changes: Any) -> str:
        render = Render.model_validate({"kind": "others:Model", "options": {"level": 2}} | changes)
        return Renderer(render, str(tmp_path / "videos"), 7)._job(row).key

    plain = key()
    assert key(time_limit_s=5) == key(pool={"num_gpus": 1}) == key(kind="others:Model@1.2") == plain
    others = [key(options={"level": 3}), key(kind="others:Loaded"), key(model="m"), key(frames=5)]
    install("1.3")
    assert len({plain, *others, key()}) == 6


def test_what_a_model_says_of_itself_is_what_its_rows_are_made_with(install: Install) -> None:
    install()
    named = [f"{key}={{{name}: 'others:Loaded', options: {{level: 4}}}}"
             for key, name in (("reward", "kind"), ("render", "kind"), ("judge", "backend"))]  # fmt: skip
    recipe = tiny(*named)
    for stage, key in (("score", "reward.kind"), ("render", "render.kind"), ("judge", "judge.backend")):
        assert made_with.facts(recipe, stage)[key] == "others:Loaded@weights-7+level 4"


def test_a_drafts_id_follows_the_engine_of_another(install: Install) -> None:
    install()
    draft = "draft={examples: vpo_ray/data/sft.jsonl, llm: {backend: 'others:Model', options: {level: %d}}}"
    recipes = [tiny(draft % level) for level in (1, 2)]
    judge = Judge(model="m")
    assert len({draft_key(recipe.draft, judge, []) for recipe in recipes if recipe.draft}) == 2


def test_options_are_data(install: Install) -> None:
    """Whatever they say, a builder gets them as they are written."""
    install(text=MODULE.replace("level: int = Field(1, gt=0)", "level: str"))
    hostile = "$(touch /tmp/x); {{ 1 + 1 }} %s \n"
    llm = ChatModel.model_validate({"backend": "others:Model", "options": {"level": hostile}})
    from vpo_ray.engines.chat import build

    assert build(llm).options.level == hostile  # type: ignore[attr-defined]
    assert hostile in json.loads(json.dumps(llm.model_dump()))["options"].values()


def test_the_builders_of_the_documentation_are_builders(install: Install) -> None:
    page = (Path(__file__).parents[2] / "docs/plugins.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    install(text="\n".join(blocks))
    for name in ("Size", "Ours", "Gateway"):
        assert plugins.load_builder(f"others:{name}").version
    settings = Reward.model_validate({"kind": "others:Size", "options": {"most": 10}})
    assert [scored.score for scored in rewards.build(settings).score([b"12345"], ["a cat"])] == [0.5]  # type: ignore[union-attr]


def test_a_plugin_may_have_an_endpoint_of_its_own(install: Install) -> None:
    install()
    endpoint = "{base_url: 'http://127.0.0.1/v1'}"
    assert tiny(f"render={{kind: 'others:Model', endpoint: {endpoint}, version: v1}}").render.version == "v1"


def test_what_a_models_options_name_is_found_and_located_and_travels(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    for name in ("clip", "scorer"):
        (tmp_path / name).mkdir()
    (tmp_path / "words.txt").write_text("ball", "utf-8")
    monkeypatch.chdir(tmp_path)
    reward = Reward.model_validate(
        {"kind": "others:Reads", "model": "scorer", "options": {"clip": "clip", "words": "words.txt"}}
    )
    assert reward.models() == {"model": "scorer", "options.clip": "clip"}
    assert reward.files() == {"options.words": "words.txt"}
    located = reward.located()
    assert located.options == {"clip": str(tmp_path / "clip"), "words": str(tmp_path / "words.txt")}
    recipe = tiny("reward={kind: 'others:Reads', options: {clip: clip, words: words.txt}}")
    assert plugins.plugin_sources(recipe) == {
        "reward.options.clip": "clip",
        "reward.options.words": "words.txt",
    }


PAYING = """
from pydantic import BaseModel
class Paid:
    takes_account = True
    class Options(BaseModel):
        level: int = 1
    def __init__(self, settings, options, account):
        self.account = account
    @staticmethod
    def problems(settings, options):
        return [] if settings.model else ["model is missing"]
    @staticmethod
    def variables(settings, options):
        return [f"KEY_{options.level}"]
    @staticmethod
    def dimensions(settings, options):
        return ["a", "b"]
    def score(self, videos, queries): ...
"""
LACKING = """
from pydantic import BaseModel
class Empty:
    class Options(BaseModel):
        pass
    def __init__(self, settings, options):
        pass
class Bare(Empty):
    def render(self, prompts, seeds): ...
class Alone(Empty):
    def __init__(self): ...
    def score(self, videos, queries): ...
class Blind(Empty):
    def score(self, videos): ...
class Short(Empty):
    async def complete(self, messages): ...
class Asks(Empty):
    def identity(self, settings, options): ...
    def score(self, videos, queries): ...
class Exits(Asks):
    @staticmethod
    def identity(settings, options): ...
    @staticmethod
    def problems(settings, options):
        raise SystemExit(3)
class Delegates(Empty):
    def __getattr__(self, name): ...
class Told(Bare):
    @staticmethod
    def problems(settings, options):
        return "no such weights"
    animate_files = warm_up = cut = stored = Bare.render
def make(settings, options):
    return Empty(settings, options)
make.Options = Empty.Options
"""


def test_a_builder_may_take_the_account_and_look_at_its_section(install: Install) -> None:
    install(text=PAYING)
    account = Account(limit=3)
    paid: Any = rewards.build(Reward.model_validate({"kind": "others:Paid", "model": "m"}), account)
    assert paid.account is account
    section = Reward.model_validate({"kind": "others:Paid"})
    with pytest.raises(PluginError, match=r"others:Paid@1\.2: model is missing"):
        rewards.build(section)
    assert plugins.plugin_problems({"reward.kind": section}) == {"reward.kind": "model is missing"}
    assert plugins.find(section).variables(section) == ["KEY_1"]
    assert plugins.find(section).dimensions(section) == {"a", "b"}
    ask = asked(tiny("reward={kind: 'others:Paid', model: m, options: {level: 7}}"))
    assert "KEY_7" in ask.variables


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        (Reward, "Empty", "Empty has no score or score_prompts: let it have what vpo_ray.engines.reward."),
        (Judge, "Bare", "Bare has no complete: let it have what vpo_ray.engines.chat.Chat has"),
        (Render, "Bare", "Bare has no animate_files, warm_up, cut, stored: let it have"),
        (Render, "Told", "no such weights"),
        (Reward, "Alone", "it is called with (settings, options): too many positional arguments"),
        (Reward, "Blind", "score is given 2 arguments: too many positional arguments"),
        (Judge, "Short", "complete is given 3 arguments: too many positional arguments"),
        (
            Reward,
            "Asks",
            "identity is called with (settings, options), and no self, as a @staticmethod: missing",
        ),
        (Reward, "Exits", "SystemExit: 3"),
    ],
)
def test_the_plan_says_what_a_model_has_to_have(
    install: Install, kind: type[Any], name: str, says: str
) -> None:
    install(text=LACKING)
    section = kind.model_validate({kind.key: f"others:{name}"})
    assert says in plugins.plugin_problems({"it": section})["it"]
    with pytest.raises(PluginError, match=re.escape(says)):
        plugins.find(section).build(section)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise SystemExit('bye')", "cannot be imported: SystemExit: bye"),
        ("def x(:", "cannot be imported: SyntaxError"),
        (
            "import pydantic\nclass Model:\n    class Options(pydantic.BaseModel):\n        a: 'Unknown'",
            "its Options: name 'Unknown' is not defined",
        ),
    ],
)
def test_whatever_a_module_does_is_a_line_of_the_plan(install: Install, text: str, says: str) -> None:
    install(text=text)
    section = Reward.model_validate({"kind": "others:Model"})
    assert says in plugins.plugin_problems({"it": section})["it"]


def test_what_a_module_prints_is_no_result(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(text=f"print('hello')\n{MODULE}")
    plugins.load_builder("others:Model")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_module_of_the_working_directory_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_alone.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with pytest.raises(PluginError, match=r"It is in the working directory: set PYTHONPATH=\. or install it"):
        plugins.load_builder("mine_alone:Model")


def test_what_a_function_makes_is_looked_at_too_and_what_passes_all_on_is_not(install: Install) -> None:
    install(text=LACKING)
    section = Reward.model_validate({"kind": "others:make"})
    assert plugins.plugin_problems({"it": section}) == {}
    with pytest.raises(PluginError, match="Empty has no score or score_prompts"):
        rewards.build(section)
    rewards.build(Reward.model_validate({"kind": "others:Delegates"}))


def test_options_that_are_refused_name_nothing(install: Install) -> None:
    install()
    reward = Reward.model_validate({"kind": "others:Reads", "options": {"words": 3}})
    assert reward.models() == reward.files() == {}
    assert reward.located().options == {"words": 3}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"kind": "text", "options": {"words": [1, 3]}, "checklist": {"file": "c"}, "template": "vqa"},
         "template and checklist have no effect with kind: text"),
        ({"kind": "laion_aesthetic", "options": {"clip": "a", "head": "b"}, "model": "m", "dtype": "float16"},
         "model and dtype have no effect with kind: laion_aesthetic"),
        ({"kind": "mps", "model": "m", "attention": "eager"}, "attention has no effect with kind: mps"),
        ({"kind": "videoscore", "model": "m", "options": {"query_prompt": "q"}, "endpoint": {"retries": 9}},
         "endpoint has no effect with kind: videoscore"),
        ({"kind": "videoreward", "model": "m", "options": {"template": "t"}, "rule": "margin"},
         "rule has no effect with kind: videoreward"),
        ({"kind": "http", "endpoint": {"base_url": "http://a"}, "dtype": "float16"}, "dtype has no effect"),
    ],
)  # fmt: skip
def test_a_key_that_our_rewards_do_not_look_at_is_named(section: dict[str, Any], says: str) -> None:
    [told] = plugins.plugin_problems({"reward.kind": Reward.model_validate(section)}).values()
    assert told.startswith(says)


def test_a_gate_has_no_model_for_words() -> None:
    given = {"kind": "text", "model": "m", "options": {"words": [1, 3]}, "least": {"length": 1}}
    [told] = plugins.plugin_problems({"gate.kind": RenderGate.model_validate(given)}).values()
    assert told == "model has no effect with kind: text"
    used = {"kind": "text", "device": "cuda", "options": {"encoder": "e"}, "least": {"similarity": 0.5}}
    assert plugins.plugin_problems({"gate.kind": RenderGate.model_validate(used)}) == {}
