"""The policies of a run: what each is by content, and from which one the run starts.

An identity is a function of the recipe and of the rows that a policy learns, not of the weights' bits,
so that candidates have the same ids wherever the policy was trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vpo_ray.files.image_files import ImageError, image_hash
from vpo_ray.prompts.conditions import Conditions, asked_of
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import EVOLVED, Recipe
from vpo_ray.records import Row, candidate_id, content_id, query_id
from vpo_ray.stages.chains import Models, rows_of_stage, table_of_stage
from vpo_ray.stages.curate.images import QueryImages
from vpo_ray.stages.profiles import under
from vpo_ray.stages.sample import identity_key
from vpo_ray.storage.images import images_of, shown_images
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import distinct, draft_rows, evolved_rows, sft_files, sft_rows

logger = logging.getLogger(__name__)


class LoopError(RuntimeError):
    """The loop cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Start:
    """The policy that a run samples and trains further.

    policy: its folder. identity: what it is by content, see policy_id. reference: the folder of
    DPO's reference where that is another policy. sampler: the folder of the policy that is sampled, where
    that is another one, and sampler_identity what candidates are known by that come from it.
    """

    policy: str
    identity: str
    reference: str | None = None
    sampler: str | None = None
    sampler_identity: str | None = None

    @property
    def sampled(self) -> Models:
        """The policy that candidates come from."""
        return Models(self.sampler or self.policy, self.sampler_identity or self.identity)


def training_rows(recipe: Recipe, run: RunDir) -> list[Row]:
    """What SFT learns: `sft.data` where the recipe names it, the run's evolved prompts, or its drafts.

    Raises:
        LoopError: there are none yet.
    """
    if recipe.sft is None:
        return []
    if recipe.sft.data == EVOLVED:
        rows = list(evolved_rows(run))
        if not rows:
            raise LoopError(f"{run.at('evolutions')} has no SFT target: run `vpo evolve` first")
        return rows
    if recipe.sft.data is not None:
        columns = recipe.sft.profile_column, recipe.sft.image_column
        found = sft_rows(recipe.sft.data, "sft.data", *columns)
        return list(with_profiles(recipe, _with_images(recipe, run, found)))
    rows = list(draft_rows(run))
    if not rows:
        raise LoopError(f"{run.at('drafts')} holds nothing to train on: run `vpo draft` first")
    return rows


def _with_images(recipe: Recipe, run: RunDir, rows: Iterable[Row]) -> Iterator[Row]:
    """SFT rows with the images that they name, which the run stores.

    Raises:
        LoopError: there is no such image, or it cannot be used.
        InputError: a disk or store cannot be read now.
    """
    assert recipe.sft is not None
    assert recipe.sft.data is not None
    if recipe.sft.image_column is None:
        yield from rows
        return
    every = list(rows)
    for number, row in enumerate(every, start=1):
        if row["image"] is not None and not isinstance(row["image"], str):
            raise LoopError(f"sft.image_column: row {number} has no path of an image")
    named = tuple(sorted({(row["file"], row["image"]) for row in every if row["image"] is not None}))
    taken = _taken(recipe.sft.data, images_of(run).folder.uri, named)
    for number, row in enumerate(every, start=1):
        image = taken.get((row.pop("file"), row["image"]))
        if isinstance(image, ImageError):
            raise LoopError(f"sft.image_column: row {number}: {image.reason}: {image}")
        of = {} if image is None else {"query_id": query_id(row["query"], image_hash(image))}
        yield {**row, "image": image, **of}


@cache
def _taken(
    data: str, store: str, named: tuple[tuple[int, str], ...]
) -> Mapping[tuple[int, str], str | ImageError]:
    """The images that rows of a file name, by the number of the file and the path: once in a process, as
    policies are identified often."""
    found = QueryImages(sft_files(data), store, "sft.image_column").take(named)
    return dict(zip(named, found, strict=True))


def with_profiles(recipe: Recipe, rows: Iterable[Row]) -> Iterator[Row]:
    """SFT rows with the conditions of the profiles that they name.

    Raises:
        LoopError: there is no such profile, or a prompt does not meet it.
    """
    for number, row in enumerate(rows, start=1):
        name = row.get("profile")
        if name is not None:
            if name not in recipe.profiles:
                known = ", ".join(recipe.profiles)
                raise LoopError(f"sft.data: row {number} names the profile {name!r}; there are {known}")
            row = {**row, **under(name, row["query"], recipe.profiles, recipe.seed, row["prompt"])}
            if unmet := Conditions.stored(row["conditions"]).unmet(row["prompt"]):
                raise LoopError(
                    f"sft.data: the prompt of row {number} does not meet its profile {name} "
                    f"({'; '.join(unmet)}): correct it, or take the profile's name from the row"
                )
        yield row


def policy_id(recipe: Recipe, run: RunDir) -> str:
    """The identity of the policy that is sampled: model, task prompt, and how SFT makes it.

    It is a function of the recipe and its SFT data, not of the weights' bits, so that candidates
    have the same ids wherever the policy was trained.
    """
    policy = recipe.policy
    parts: list[Any] = [policy.model, policy.revision, read_prompt(policy.task_prompt), recipe.seed]
    if policy.chat_template_kwargs:
        parts.append({"chat_template_kwargs": policy.chat_template_kwargs})
    if recipe.sft is not None:
        rows = training_rows(recipe, run)
        parts += [recipe.fingerprint("sft"), [[row["query"], row["prompt"]] for row in rows]]
        if told := [[asked_of(row), row["prompt"]] for row in rows if row.get("conditions")]:
            parts.append({"asked": told})
        if shown_images(recipe, run, policy.images) and any(row.get("image") for row in rows):
            parts.append({"images": [row.get("image") for row in rows]})
        learnt, _ = distinct(rows)
        prompts = {(row["query_id"], row["prompt"]) for row in learnt}
        # Earlier versions learnt one of them.
        if len({query for query, _ in prompts}) < len(prompts):
            parts.append("every prompt of a query")
        if len(prompts) < len(learnt):
            parts.append("every profile of a prompt")
    return content_id("policy", *parts, digits=16)


def refuse_other_policy(recipe: Recipe, run: RunDir, identity: str) -> None:
    """Raises LoopError where the run has candidates that this policy would not be asked for."""
    columns = ["candidate_id", "query_id", "k", "policy", "conditions"]
    row = next(rows_of_stage(run, "sample", columns), None)
    if row is None or row["policy"] is None:
        return
    key = identity_key(recipe.sample, recipe.seed, row["conditions"])
    if row["candidate_id"] != candidate_id(row["query_id"], row["k"], identity, key):
        raise LoopError(
            f"{run.at('candidates')} was sampled from another policy than this recipe's: its SFT data or "
            "task prompt changed since, or it was made by a version of vpo that learnt one prompt of a query "
            "only or did not look at engine_kwargs. Give the recipe another `out`"
        )


def is_sampled(run: RunDir) -> bool:
    """Whether the run has candidates, which are known by what SFT learnt."""
    return table_of_stage(run, "sample") is not None


def may_retry(run: RunDir, what: str) -> bool:
    """Whether rows of SFT data that failed may be taken once more. Where candidates of the policy that learnt
    the others are there, more data would make it another, and the run could not go on.

    Args:
        what: the rows, for messages.
    """
    if not is_sampled(run):
        return True
    logger.warning(
        "%s that failed are not taken again: %s has candidates of the policy that learnt the others",
        what,
        run.uri,
    )
    return False


def learnt_id(recipe: Recipe, run: RunDir, start: Start) -> str:
    """The identity of the policy after DPO on the run's pairs, or after RL on its groups."""
    phase = recipe.learns
    assert phase is not None
    rows = sorted(run.table({"dpo": "pairs", "rl": "groups"}[phase]).keys())
    return content_id(phase, start.identity, recipe.fingerprint(phase), rows, digits=16)
