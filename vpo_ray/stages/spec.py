"""The stages of the loop that make rows, one entry each; whatever runs, counts or shows them reads it here.

    queries ─► sample ─► judge ─► render ─► score ─► feedback     the chain "generation"
    queries ─► draft ─► drafts                                    the chain "drafting"
    histories ─► evolve ─► offspring                              the chain "evolving", of an evolution
    unlabelled ─► label ─► labels                                 the chain "labelling"
    unwritten ─► rewrite ─► rewrites                              the chain "rewriting", of an evaluation
    matches ─► prefer ─► preferences                              the chain "preferring", of an evaluation

`register` adds a stage of one's own: a file with its functions, and an entry. It then streams and resumes
with the others, and is in the ledger, the plan and the doctor; `vpo NAME recipe.yaml` runs it alone.

Nothing heavy is imported here: the functions of an entry are imported when they are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # `vpo --help` reads this list
    import pyarrow as pa

    from vpo_ray.engines.endpoint.account import Account
    from vpo_ray.recipe import ChatModel, Engine, EvaluatedPolicy, Pool, Preference, Recipe
    from vpo_ray.stages.tally import Tally

ChainName = Literal["labelling", "drafting", "evolving", "generation", "rewriting", "preferring"]
RunsOn = Literal["policy", "chat", "batch"]
CHAINS: tuple[ChainName, ...] = (
    "labelling",
    "drafting",
    "evolving",
    "generation",
    "rewriting",
    "preferring",
)


class StageError(ValueError):
    """A stage that cannot be registered; the message says why."""


def _in(module: str, name: str) -> Callable[..., Any]:
    """A function of one of the package's stages, imported when it is called."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"vpo_ray.stages.{module}"), name)(*arguments)

    return call


_no_more = _in("tally", "Tally")


@dataclass(frozen=True)
class Making:
    """What a stage is made from, for its replicas: paths and URIs that hold on every node.

    Args:
        store: URI of the video store.
        account: what a stage pays endpoints from, if it asks any.
        images: URI of the images of queries.
    """

    recipe: Recipe
    store: str
    account: Account
    images: str | None = None


@dataclass(frozen=True)
class StageSpec:
    """All that is known of a stage.

    Args:
        name: of the stage, its command and its `error_stage`; a-z and _.
        chain: which chain it is in, in the order of registration.
        table: of the run directory, with the rows that left the stage.
        section: the recipe's key of its settings, with `pool` and, for texts, `engine`; or a function of
            the recipe that gives the key and the settings.
        runs_on: `policy`: a text stage (`engines.chat.ChatStage`) on the policy that is sampled; `chat`: a
            text stage on the LLM of its section, by vLLM or an endpoint; `batch`: a stage of whole batches
            (`stream.actor_pools.Stage`) on replicas that hold a model of their own, or none.
        make: what is called in every replica, without arguments, to make the stage.
        facts: what its rows are made with beyond the recipe's text, by a name for messages; see `made_with`.
        tally: what the ledger counts of its rows.
        settings: sections of the recipe that decide how long a row takes, for `vpo plan`.
        help: of its command. Without one it has no command.
        calls: batches that a `batch` replica works on at once.
        in_recipe: whether a recipe has the stage at all, for the ledger.
        is_due: whether `vpo run` needs it, for plan and doctor.
        columns: what it adds to the rows of its chain, for stages that are registered.
    """

    name: str
    chain: ChainName
    table: str
    section: str | Callable[[Recipe], tuple[str, Any]]
    runs_on: RunsOn
    make: Callable[[Making], Callable[[], Any]]
    tally: Callable[[], Tally] = _no_more
    facts: Callable[[Recipe], Iterable[tuple[str, str]]] = lambda recipe: ()
    settings: tuple[str, ...] = ()
    help: str = ""
    calls: Callable[[Recipe], int] = lambda recipe: 1
    in_recipe: Callable[[Recipe], bool] = lambda recipe: True
    is_due: Callable[[Recipe], bool] = lambda recipe: True
    columns: Sequence[pa.Field] = ()

    def key(self, recipe: Recipe) -> str:
        """The recipe's key of the section that the stage runs by."""
        return self.section if isinstance(self.section, str) else self.section(recipe)[0]

    def of(self, recipe: Recipe) -> Any:
        """That section."""
        if not isinstance(self.section, str):
            return self.section(recipe)[1]
        found: Any = recipe
        for part in self.section.split("."):
            found = getattr(found, part)
        return found

    def pool(self, recipe: Recipe) -> Pool:
        return self.of(recipe).pool

    def engine(self, recipe: Recipe) -> Engine | None:
        """The LLM engine of a replica's own. One that asks an endpoint has none, and is one piece."""
        section = self.of(recipe)
        by_vllm = self.runs_on == "policy" or (self.runs_on == "chat" and section.backend == "vllm")
        return section.engine if by_vllm else None

    def block_rows(self, recipe: Recipe) -> int:
        """Rows of the stage's blocks."""
        section = self.of(recipe)
        return section.batch_size if hasattr(section, "batch_size") else section.engine.batch_size


def draft_model(recipe: Recipe) -> tuple[str, ChatModel]:
    """The recipe's key of the LLM that drafts, and its settings."""
    if recipe.draft is not None and recipe.draft.llm is not None:
        return "draft.llm", recipe.draft.llm
    return "judge", recipe.judge


def evolving_model(recipe: Recipe) -> tuple[str, ChatModel]:
    """The recipe's key of the LLM that writes new prompts of an evolution, and its settings."""
    if recipe.evolve is not None and recipe.evolve.llm is not None:
        return "evolve.llm", recipe.evolve.llm
    return "judge", recipe.judge


def rewrites(recipe: Recipe) -> bool:
    """Whether the recipe evaluates one policy alone, and that is an LLM which is not trained."""
    policies = recipe.evaluate.policies if recipe.evaluate is not None else {}
    return [policy.kind in ("few_shot", "endpoint") for policy in policies.values()] == [True]


def rewriting_policy(recipe: Recipe) -> tuple[str, EvaluatedPolicy]:
    """The name and settings of that policy."""
    assert recipe.evaluate is not None
    ((name, policy),) = recipe.evaluate.policies.items()
    return name, policy


def rewriter(recipe: Recipe) -> tuple[str, ChatModel]:
    """The recipe's key of the LLM of that policy, and its settings."""
    name, policy = rewriting_policy(recipe)
    return draft_model(recipe) if policy.llm is None else (f"evaluate.policies.{name}.llm", policy.llm)


def asks_with_query(recipe: Recipe) -> bool:
    """Whether that LLM is asked with the query itself, without words around it."""
    _, policy = rewriting_policy(recipe)
    return policy.kind == "endpoint" and policy.prompt is None


def prefers(recipe: Recipe) -> bool:
    """Whether the recipe asks an LLM for one kind of preference."""
    settings = recipe.evaluate
    return settings is not None and (settings.prefer_prompts is None) != (settings.prefer_videos is None)


def preference(recipe: Recipe) -> tuple[str, Preference]:
    """The recipe's key of that preference, and its settings."""
    settings = recipe.evaluate
    if settings is not None and settings.prefer_prompts is not None:
        return "evaluate.prefer_prompts", settings.prefer_prompts
    assert settings is not None
    assert settings.prefer_videos is not None
    return "evaluate.prefer_videos", settings.prefer_videos


def preference_model(recipe: Recipe) -> tuple[str, ChatModel]:
    """The recipe's key of the LLM that has it, and its settings."""
    key, settings = preference(recipe)
    return f"{key}.llm", settings.llm


def stages(chain: ChainName | None = None) -> list[StageSpec]:
    """The stages of a chain in their order, or of all chains in the order of the loop."""
    return [spec for spec in STAGES.values() if chain in (None, spec.chain)]


def stage(name: str) -> StageSpec:
    return STAGES[name]


def names(chain: ChainName) -> tuple[str, ...]:
    return tuple(spec.name for spec in stages(chain))


def register(new: StageSpec, before: str | None = None) -> None:
    """Add a stage, before another one of its chain or at its end. Registering the same entry again does
    nothing, so a module may do it when it is imported.

    Rows of all its chain's tables get its `columns`, and a place for its seconds and tokens.

    Raises:
        StageError: another stage or table has its name, `before` is no stage of its chain, or a run could not
            hold what it adds.
    """
    if STAGES.get(new.name) == new:
        return
    import pyarrow as pa

    from vpo_ray.storage.run_dir import TABLES, widen

    if new.name in STAGES or new.table in TABLES:
        raise StageError(f"a stage {new.name} or a table {new.table} is there already")
    for what, name in (("stage", new.name), ("table", new.table)):
        if not re.fullmatch("[a-z_]+", name):
            raise StageError(f"{name!r} is no name for a {what}: use a-z and _")
    for what, value, known in (("chain", new.chain, CHAINS), ("runs_on", new.runs_on, get_args(RunsOn))):
        if value not in known:
            raise StageError(f"{what} {value!r}: write one of {', '.join(known)}")
    own = names(new.chain)
    if before is not None and before not in own:
        raise StageError(f"no stage {before} is in the chain {new.chain}: {', '.join(own)}")
    tables = [spec.table for spec in stages(new.chain)]
    taken = set(TABLES[tables[0]][0].names)
    for column in new.columns:
        if not isinstance(column, pa.Field) or not column.nullable or column.name in taken:
            raise StageError(
                f"column {getattr(column, 'name', column)}: give a field of pyarrow that may be null, under "
                f"a name that the tables of {new.chain} do not have"
            )
        taken.add(column.name)
    TABLES[new.table] = TABLES[tables[0]]
    widen([*tables, new.table], new.name, new.columns)
    after = own[own.index(before) :] if before is not None else ()
    later = {name: STAGES.pop(name) for name in after}
    STAGES[new.name] = new
    STAGES.update(later)


def _of_package(name: str, chain: ChainName, table: str, section: Any, **more: Any) -> StageSpec:
    make, facts, tally = (_in(name, part) for part in ("make", "facts", "tally"))
    return StageSpec(name, chain, table, section, make=make, facts=facts, tally=tally, **more)


STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        _of_package(
            "label",
            "labelling",
            "labels",
            "judge",
            runs_on="chat",
            settings=("judge",),
            in_recipe=lambda recipe: recipe.queries.unsafe_judge,
            is_due=lambda recipe: recipe.queries.unsafe_judge,
        ),
        _of_package(
            "draft",
            "drafting",
            "drafts",
            draft_model,
            runs_on="chat",
            settings=("draft", "judge"),
            in_recipe=lambda recipe: recipe.draft is not None,
            is_due=lambda recipe: recipe.drafts_first,
            help="SFT data for the sft split's queries into drafts/ and sft_data.parquet",
        ),
        _of_package(
            "evolve",
            "evolving",
            "offspring",
            evolving_model,
            runs_on="chat",
            settings=("evolve", "judge"),
            in_recipe=lambda recipe: recipe.evolve is not None,
            is_due=lambda recipe: recipe.evolves_first,
        ),
        _of_package(
            "sample",
            "generation",
            "candidates",
            "sample",
            runs_on="policy",
            settings=("policy", "sample"),
            help="queries/ to candidates/ with the policy",
        ),
        _of_package(
            "judge",
            "generation",
            "verdicts",
            "judge",
            runs_on="chat",
            settings=("judge",),
            help="candidates/ to verdicts/ with the judge: critique, refine, judge again",
        ),
        _of_package(
            "render",
            "generation",
            "renders",
            "render",
            runs_on="batch",
            settings=("render",),
            calls=_in("render", "calls"),
            help="verdicts/ to renders/ with the video model",
        ),
        _of_package(
            "score",
            "generation",
            "feedback",
            "reward",
            runs_on="batch",
            settings=("reward", "more_rewards"),
            help="renders/ to feedback/ with the reward model",
        ),
        _of_package(
            "rewrite",
            "rewriting",
            "rewrites",
            rewriter,
            runs_on="chat",
            in_recipe=rewrites,
            is_due=lambda recipe: False,
        ),
        _of_package(
            "prefer",
            "preferring",
            "preferences",
            preference_model,
            runs_on="chat",
            in_recipe=prefers,
            is_due=lambda recipe: False,
        ),
    )
}
