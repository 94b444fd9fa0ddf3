"""What a stage's rows are made with beyond the recipe's own text, so that one table never mixes two.

The recipe names files and models, and their content may change under the same name; so may the engines
that are installed. `made_with/<stage>.json` of the run directory says what the first rows of a stage were
made with, and rows are only added with the same. What is finished can be read with anything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from vpo_ray.engines.video.weights import sampled
from vpo_ray.files.folder import StorageError
from vpo_ray.files.input_files import READ_ERRORS, InputError, file_at, walk
from vpo_ray.prompts.policy_prompt import PromptError, read_prompt
from vpo_ray.recipe import ChatModel, Recipe
from vpo_ray.recipe.plugins import Modelled, PluginError, find
from vpo_ray.records import content_id
from vpo_ray.storage import model_cache
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.stream.chains import CHAIN_OF, draft_model
from vpo_ray.versions import short_version

logger = logging.getLogger(__name__)

Facts = dict[str, str]

# Files of a model's folder that decide what it says: weights, configuration, tokenizer, template, code.
_MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".txt", ".model",
                          ".tiktoken", ".jinja", ".py"})  # fmt: skip


class OtherInputsError(ValueError):
    """A stage's rows were made with something else than is here now; the message says what."""


def refuse_other_inputs(recipe: Recipe, run: RunDir, stages: Iterable[str]) -> None:
    """Call it before the stages make rows; notes what they are made with where they have none yet.

    Raises:
        OtherInputsError: a stage has good rows that were made with other inputs or engines.
    """
    for stage in stages:
        name = f"made_with/{stage}.json"
        now = facts(recipe, stage)
        # A shard's rows are made beside those of others, which may not be there yet.
        if run.exists(name) and (run.shard is not None or _has_rows(run, stage)):
            then: Facts = run.read_json(name)
            changed = [
                f"{key}: {then[key]} -> {now[key]}"
                for key in sorted(then.keys() & now.keys())
                if then[key] != now[key]
            ]
            if changed:
                raise OtherInputsError(
                    f"{CHAIN_OF[stage].table(run, stage).uri} was made with other inputs or engines than are "
                    "here now:\n  " + "\n  ".join(changed) + "\nPut the old ones back, or give the recipe "
                    f"another `out`. To have both in one table, delete {run.at(name)}"
                )
            now = {**now, **then}
        run.write_json(name, now)


def facts(recipe: Recipe, stage: str) -> Facts:
    """What a stage's rows depend on, by a name for messages. What cannot be read here, where it need not
    be, is left out."""
    return dict(_FACTS[stage](recipe))


def _has_rows(run: RunDir, stage: str) -> bool:
    """Whether the stage has made a row that is good; others only passed through its table."""
    rows = CHAIN_OF[stage].table(run, stage).rows(["seconds", "error"])
    return any(row["error"] is None and (row["seconds"] or {}).get(stage) is not None for row in rows)


def _label(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from _chat("judge", recipe.judge)
    yield from _prompts("queries.unsafe_prompt", recipe.queries.unsafe_prompt)


def _draft(recipe: Recipe) -> Iterator[tuple[str, str]]:
    assert recipe.draft is not None
    yield from _chat(*draft_model(recipe))
    yield from _prompts("draft.prompt", recipe.draft.prompt)
    yield from _judge_prompts(recipe)
    try:
        rows = [[row["query"], row["prompt"]] for row in sft_rows(recipe.draft.examples, "draft.examples")]
    except InputError:
        return
    yield "draft.examples", _content(rows)


def _sample(recipe: Recipe) -> Iterator[tuple[str, str]]:
    # The task prompt and SFT are in the policy's identity, the base model's weights are not.
    yield from _versions("vllm")
    yield from _model("policy.model", recipe.policy.model)


def _judge(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from _chat("judge", recipe.judge)
    yield from _judge_prompts(recipe)


def _render(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.render.kind != "diffusers":
        yield from _plugin("render", recipe.render)
        return
    yield from _versions(
        "diffusers", "torch", "transformers", *(["torchao"] if recipe.render.quantize else [])
    )
    yield from _model("render.model", recipe.render.model)
    if recipe.render.lora is not None:
        yield from _model("render.lora.path", recipe.render.lora.path)


def _score(recipe: Recipe) -> Iterator[tuple[str, str]]:
    rewards = {"reward": recipe.reward}
    rewards |= {f"more_rewards.{name}": reward for name, reward in recipe.more_rewards.items()}
    for where, reward in rewards.items():
        yield from _plugin(where, reward)
        for name, path in reward.files().items():
            if path is not None:
                yield from _file(f"{where}.checklist.{name}", path)
        if reward.kind == "visionreward":
            yield from _versions("torch", "transformers")
            yield from _model(f"{where}.model", reward.model)


_FACTS = {
    "label": _label,
    "draft": _draft,
    "sample": _sample,
    "judge": _judge,
    "render": _render,
    "score": _score,
}


def _judge_prompts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from _prompts("judge.critique_prompt", recipe.judge.critique_prompt)
    yield from _prompts("judge.refine_prompt", recipe.judge.refine_prompt)


def _chat(where: str, model: ChatModel) -> Iterator[tuple[str, str]]:
    yield from _plugin(where, model)
    if model.backend == "vllm":
        yield from _versions("vllm")
        yield from _model(f"{where}.model", model.model)


def _plugin(where: str, section: Modelled) -> Iterator[tuple[str, str]]:
    """What another's model says that its results depend on; its name and version are in the recipe."""
    if section.is_plugin:
        with suppress(PluginError):
            yield f"{where}.{section.key}", find(section).identity(section)


def _versions(*names: str) -> Iterator[tuple[str, str]]:
    yield from ((name, found) for name in names if (found := short_version(name)) is not None)


def _prompts(key: str, name: str) -> Iterator[tuple[str, str]]:
    try:
        yield key, _content(read_prompt(name))
    except PromptError:
        return  # the stage says so, on the node that reads it


def _file(key: str, path: str) -> Iterator[tuple[str, str]]:
    try:
        with file_at(path).open() as stream:
            yield key, _content(stream.read().hex())
    except READ_ERRORS:
        return


def _model(key: str, path: str) -> Iterator[tuple[str, str]]:
    """A local model is its files: names, sizes, and samples of what is in them. One at a URI is what
    the store says of its files."""
    if "://" in path:
        with suppress(StorageError):
            yield key, f"content {model_cache.version(path)[:12]}"
        return
    place = Path(os.path.expanduser(path))
    if place.exists():
        yield key, _content([[name, *sampled(file)] for name, file in _files(place)])


def _files(place: Path) -> Sequence[tuple[str, Path]]:
    if place.is_file():
        return [(place.name, place)]
    files = (path for path in walk(place, every_name=True) if path.suffix in _MODEL_FILES)
    visible = (path for path in files if not path.name.startswith(".") and path.is_file())
    return sorted((str(path.relative_to(place)), path) for path in visible)


def _content(value: object) -> str:
    return f"content {content_id(value, digits=12)}"
