"""Check a recipe against the files that it names, before Ray starts.

`vpo run` and `vpo plan` begin with it, so that a wrong path is found before a GPU is touched.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vpo_ray.engines.reward import checklist as checklists
from vpo_ray.files.folder import StorageError
from vpo_ray.keywords import KeywordFileError, KeywordList
from vpo_ray.loop.policies import LoopError, with_profiles
from vpo_ray.plan import folders, models
from vpo_ray.plan.dimensions import fitness_problems, formula_problems
from vpo_ray.plan.folders import local_path
from vpo_ray.plan.images import image_problems
from vpo_ray.prompts.policy_prompt import SLOT, PromptError, read_prompt
from vpo_ray.recipe import (
    EVOLVED,
    ChatModel,
    Checklist,
    Draft,
    Evaluation,
    Pair,
    Recipe,
    RenderGate,
    Reward,
    Rules,
    Serve,
    Sft,
    plugins,
)
from vpo_ray.records import PAIR
from vpo_ray.serve.keys import KeyFileError, KeyRing
from vpo_ray.stages.curate import InputError, RulesError
from vpo_ray.stages.curate.rules import check_rules
from vpo_ray.stages.evolve import COUNT, HISTORY
from vpo_ray.stages.few_shot import EXAMPLES
from vpo_ray.stages.gate import gate_problems
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.storage.tables import Table

TEXT = "{text}"  # the slot of prompts that ask for a verdict on a text


class PlanError(ValueError):
    """A recipe that names what is not there; the message lists every problem."""


def check_recipe(recipe: Recipe) -> None:
    """Raises PlanError when a model, prompt or data file of the recipe cannot be used.

    Hub ids and URIs are taken on trust: they are looked up where the models load.
    """
    refuse_problems(recipe, problems_of(recipe))


def problems_of(recipe: Recipe) -> list[str]:
    """A line for each model, prompt or data file of the recipe that cannot be used, or is not here."""
    missing = list(_of_files(recipe))
    apart = []
    if recipe.rl is not None and recipe.render.strategy == "adaptive":
        apart.append(
            "render.strategy: adaptive renders no more videos of a query than a pair takes, and rl learns "
            "from all candidates: write strategy: all"
        )
    return [*missing, *apart, *models.model_problems(recipe, {line.partition(": ")[0] for line in missing})]


def refuse_problems(recipe: Recipe, problems: Sequence[str]) -> None:
    """Raises PlanError where there are any."""
    if problems:
        raise PlanError(f"recipe {recipe.name}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))


def hub_ids(recipe: Recipe) -> list[str]:
    """A line for each model that is looked up on the hub because there is no such folder here: a
    wrong path of two parts looks just like a hub id."""
    named = {"policy.model": recipe.policy.model}
    named |= {f"{key}.model": llm.model for key, llm in chat_models(recipe).items() if llm.backend == "vllm"}
    if recipe.render.kind == "diffusers":
        named["render.model"] = recipe.render.model
    if recipe.render.lora is not None:
        named["render.lora.path"] = recipe.render.lora.path
    rewards = {"reward": recipe.reward, **{f"more_rewards.{n}": r for n, r in recipe.more_rewards.items()}}
    named |= {f"{key}.{n}": model for key, reward in rewards.items() for n, model in reward.models().items()}
    if recipe.gate is not None:
        named |= {f"gate.{n}": model for n, model in recipe.gate.models().items()}
    return [
        f"{key}: {name} is not a folder here; taken as a hub id"
        + (f" (there is a folder {name.split('/')[0]}, without it)" if Path(name).parent.is_dir() else "")
        for key, name in named.items()
        if "://" not in name and not Path(name).exists() and folders.HUB_ID.fullmatch(name)
    ]


def check_nodes(recipe: Recipe) -> None:
    """Raises PlanError when a node of the connected cluster lacks a model of others that the recipe names,
    or has another version than this machine."""
    if named := plugins.plugins_of(recipe):
        from vpo_ray.stream.each_node import each_node

        found = [
            f"{key} on node {visit.where}: {why}"
            for visit in each_node(plugins.plugin_problems, named)
            for key, why in ({"plugins": visit.failure} if visit.failure else visit.answer).items()
        ]
        refuse_problems(recipe, found)


def _of_files(recipe: Recipe) -> Iterator[str]:
    is_trained = recipe.sft is not None or recipe.learning is not None
    yield from folders.policy_folder("policy.model", recipe.policy.model, is_trained)
    for key, llm in chat_models(recipe).items():
        yield from folders.chat_folder(key, llm)
    yield from (f"{key}: {why}" for key, why in plugins.plugin_problems(plugins.plugins_of(recipe)).items())
    if recipe.render.kind == "diffusers":
        yield from folders.pipeline_folder("render.model", recipe.render.model)
    if recipe.render.lora is not None:
        yield from folders.lora_problems("render.lora", recipe.render.lora)
    if recipe.render.cache is None and recipe.render.cache_options:
        yield "render.cache_options has no effect without render.cache: name a cache"
    rewards = {"reward": recipe.reward, **{f"more_rewards.{n}": r for n, r in recipe.more_rewards.items()}}
    for key, reward in rewards.items():
        yield from _reward(key, reward)
        decides = key == ("reward" if recipe.pair.reward is None else f"more_rewards.{recipe.pair.reward}")
        if reward.checklist is not None:
            yield from _checklist(f"{key}.checklist", reward.checklist, recipe.pair if decides else None)
        elif decides and recipe.pair.dominance == "question":
            yield f"pair.dominance: question needs a checklist, {key} has none: write none or dimension"
    yield from image_problems(recipe, chat_models(recipe))
    yield from formula_problems(recipe)
    yield from fitness_problems(recipe)
    if recipe.gate is not None:
        yield from _gate(recipe.gate)
    label = recipe.queries.unsafe_judge
    for key, slots, name in (
        ("policy.task_prompt", (SLOT,), recipe.policy.task_prompt),
        ("judge.critique_prompt", (SLOT, "{prompt}"), recipe.judge.critique_prompt),
        ("judge.refine_prompt", (SLOT, "{prompt}", "{critique}"), recipe.judge.refine_prompt),
        *([("draft.prompt", (SLOT, EXAMPLES), recipe.draft.prompt)] if recipe.draft is not None else []),
        *([("evolve.prompt", (SLOT, HISTORY, COUNT), recipe.evolve.prompt)] if recipe.evolve else []),
        *([("queries.unsafe_prompt", (TEXT,), recipe.queries.unsafe_prompt)] if label else []),
        *_evaluated_prompts(recipe),
    ):
        try:
            text = read_prompt(name)
        except PromptError as error:
            yield f"{key}: {error}"
            continue
        yield from (f"{key}: {name} needs the slot {slot} once" for slot in slots if text.count(slot) != 1)
    if recipe.sft is not None and recipe.sft.data != EVOLVED:
        yield from _sft_data(recipe, recipe.sft)
    if recipe.draft is not None:
        yield from _draft(recipe.draft)
    yield from _keywords(recipe.queries.rules)
    yield from _serving(recipe.serve)
    if recipe.pair.also is not None:
        yield from _further_pairs(recipe.pair.also)
    if recipe.evaluate is not None:
        yield from _sets(recipe.evaluate)
        yield from _asked_in_evaluation(recipe.evaluate)
        yield from _evaluated_folders(recipe.evaluate)
    lengths = recipe.sample.max_tokens, recipe.sample.engine.max_model_len
    if lengths[1] is not None and lengths[0] >= lengths[1]:
        yield f"sample.max_tokens {lengths[0]} leaves no room in engine.max_model_len {lengths[1]}"


def _evaluated_prompts(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...], str]]:
    if recipe.evaluate is None:
        return
    shown = {"prefer_prompts": (SLOT, "{first}", "{second}"), "prefer_videos": (SLOT,)}
    for key, slots in shown.items():
        preference = getattr(recipe.evaluate, key)
        if preference is not None and preference.question is not None:
            yield f"evaluate.{key}.question", slots, preference.question
    if recipe.evaluate.judge is not None:
        yield "evaluate.judge.critique_prompt", (SLOT, "{prompt}"), recipe.evaluate.judge.critique_prompt
    for name, policy in recipe.evaluate.policies.items():
        if policy.prompt is not None:
            slots = (SLOT, EXAMPLES) if policy.kind == "few_shot" else (SLOT,)
            yield f"evaluate.policies.{name}.prompt", slots, policy.prompt


def absent_measures(recipe: Recipe) -> list[str]:
    """A line for each measure of an evaluation whose files are not here. It is no problem: `vpo evaluate`
    leaves it out."""
    found = _measures(recipe.evaluate, absent=True) if recipe.evaluate is not None else ()
    return [f"{line}; vpo evaluate leaves this measure out" for line in found]


def _measures(settings: Evaluation, absent: bool) -> Iterator[str]:
    """What is wrong with measures: those whose files are not here, or those whose files are."""
    for name, reward in settings.rewards.items():
        places = (*reward.models().values(), *reward.files().values())
        if any(folders.is_path(place) and not local_path(place).exists() for place in places) == absent:
            yield from _reward(f"evaluate.rewards.{name}", reward)


def _reward(key: str, reward: Reward) -> Iterator[str]:
    for name, model in reward.models().items():
        problems = list(folders.checkpoint_folder(f"{key}.{name}", model))
        yield from problems
        if not problems and reward.kind == "visionreward" and local_path(model).is_dir():
            yield from folders.reward_folder(f"{key}.{name}", model)
    if reward.kind == "vbench" or reward.is_plugin:
        yield from (line for name, path in reward.files().items() for line in _file(f"{key}.{name}", path))


def _gate(settings: RenderGate) -> Iterator[str]:
    for name, model in settings.models().items():
        yield from folders.checkpoint_folder(f"gate.{name}", model)
    yield from (line for name, path in settings.files().items() for line in _file(f"gate.{name}", path))
    if plugins.find_usable(settings) is not None:
        yield from gate_problems(settings)


def chat_models(recipe: Recipe) -> dict[str, ChatModel]:
    """The LLMs beside the policy, by the recipe's key."""
    found: dict[str, ChatModel] = {"judge": recipe.judge}
    for key, section in {"draft.llm": recipe.draft, "evolve.llm": recipe.evolve}.items():
        if section is not None and section.llm is not None:
            found[key] = section.llm
    return found


def _sft_data(recipe: Recipe, sft: Sft) -> Iterator[str]:
    """Every row is read: one that cannot be would end a run where its training begins."""
    path = sft.data
    if path is None or _elsewhere(path):
        return
    absent = [] if glob.has_magic(path) or local_path(path).is_dir() else list(_file("sft.data", path))
    yield from absent
    if absent:
        return
    try:
        rows = sft_rows(path, "sft.data", sft.profile_column, sft.image_column)
        if sum(1 for _ in with_profiles(recipe, rows)) == 0:
            yield f"sft.data {path}: it holds no rows"
    except (InputError, LoopError) as error:
        yield str(error)


def _keywords(rules: Rules) -> Iterator[str]:
    if rules.keywords is not None and not _elsewhere(rules.keywords):
        try:
            check_rules(Rules(keywords=rules.keywords))
        except RulesError as error:
            yield str(error)


def _serving(settings: Serve) -> Iterator[str]:
    """Files of serving that are here; a run does not need them."""
    uses: dict[str, tuple[str | None, Callable[[str], Any]]] = {
        "": (settings.keys, KeyRing),
        "serve.safety.keywords: ": (settings.safety.keywords, KeywordList.read),
    }
    for key, (path, use) in uses.items():
        if path is not None and not _elsewhere(path) and local_path(path).exists():
            try:
                use(path)
            except (KeyFileError, KeywordFileError) as error:
                yield f"{key}{error}"


def _sets(settings: Evaluation) -> Iterator[str]:
    """Sets of queries whose files are here, read as an evaluation reads them."""
    from vpo_ray.evaluation.sets import SetError, read_set

    for name, entry in settings.sets.items():
        if entry.path is not None and not _elsewhere(entry.path):
            try:
                read_set(name, entry, None)
            except (SetError, InputError) as error:
                yield str(error)


def _asked_in_evaluation(settings: Evaluation) -> Iterator[str]:
    """What an evaluation asks and shows beside the run's own: LLMs, examples and lists of words."""
    llms = {"judge": settings.judge, "guard": settings.guard}
    for name in ("prefer_prompts", "prefer_videos"):
        if (preference := getattr(settings, name)) is not None:
            llms[f"{name}.llm"] = preference.llm
    llms |= {f"policies.{name}.llm": policy.llm for name, policy in settings.policies.items()}
    for name, llm in llms.items():
        if llm is not None:
            yield from folders.chat_folder(f"evaluate.{name}", llm)
    for name, policy in settings.policies.items():
        if policy.examples is not None:
            yield from _examples(f"evaluate.policies.{name}", policy.examples, policy.shots)
    for name in ("required_words", "unsafe_words"):
        path = getattr(settings, name)
        if path is not None and not _elsewhere(path):
            try:
                KeywordList.read(path)
            except KeywordFileError as error:
                yield f"evaluate.{name}: {error}"


def _evaluated_folders(settings: Evaluation) -> Iterator[str]:
    """Measures, further video models and policies whose folders are here."""
    yield from _measures(settings, absent=False)
    for name, render in settings.transfer.items():
        if render.kind == "diffusers" and local_path(render.model).is_dir():
            yield from folders.pipeline_folder(f"evaluate.transfer.{name}.model", render.model)
        if render.lora is not None and local_path(render.lora.path).exists():
            yield from folders.lora_problems(f"evaluate.transfer.{name}.lora", render.lora)
    for name, policy in settings.policies.items():
        if policy.path is not None and policy.kind == "checkpoint" and local_path(policy.path).is_dir():
            yield from folders.llm_folder(f"evaluate.policies.{name}.path", policy.path)


def _further_pairs(path: str) -> Iterator[str]:
    if _elsewhere(path):
        return
    try:
        if not Table(local_path(path), PAIR, "pair_id").parts():
            yield f"pair.also: {path} holds no pairs"
    except StorageError as error:
        yield f"pair.also: {error}"


def _draft(settings: Draft) -> Iterator[str]:
    yield from _examples("draft", settings.examples, settings.shots)


def _examples(key: str, path: str, shots: int) -> Iterator[str]:
    found = local_path(path).is_dir() or glob.has_magic(path)
    absent = [] if found else list(_file(f"{key}.examples", path))
    yield from absent
    if absent or _elsewhere(path):
        return
    try:
        count = sum(1 for _ in sft_rows(path, f"{key}.examples"))
    except InputError as error:
        yield str(error)
        return
    if count < shots:
        yield f"{key}.shots {shots}: {path} has {count} examples only"


def _checklist(key: str, settings: Checklist, pair: Pair | None) -> Iterator[str]:
    """Problems of a checklist; `pair` is given for the one whose answers decide pairs."""
    files = settings.files()
    absent = [line for name, path in files.items() for line in _file(f"{key}.{name}", path)]
    yield from absent
    if absent or any(path is not None and _elsewhere(path) for path in files.values()):
        return
    try:
        questions = checklists.load_checklist(settings).questions
    except checklists.ChecklistError as error:
        yield f"{key}: {error}"
        return
    if pair and pair.dominance == "dimension" and all(question.dimension is None for question in questions):
        yield "pair.dominance: dimension needs a checklist with dimensions, this one has none"


def _file(key: str, path: str | None) -> Iterator[str]:
    if path is not None and not _elsewhere(path) and not local_path(path).is_file():
        yield (f"{key}: {path} is a folder" if local_path(path).is_dir() else f"{key}: no such file: {path}")


def _elsewhere(path: str) -> bool:
    return "://" in path and not path.startswith("file://")
