"""The plan itself: rows, work, room and money of every stage, from a recipe and figures of the past."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vpo_ray.plan.absent import absent_sources, only_absent
from vpo_ray.plan.balance import balance, makespan
from vpo_ray.plan.check import PlanError, absent_measures, hub_ids, problems_of, refuse_problems
from vpo_ray.plan.cluster import Cluster, Replica, place
from vpo_ray.plan.figures import Figure, Ledger, bytes_per_video, count_rows, published_seconds, read_ledger
from vpo_ray.plan.previews import full_renders, preview_seconds
from vpo_ray.recipe import EVOLVED, ChatModel, Engine, Pool, Recipe, Render, Training
from vpo_ray.recipe.published import Published, downloads
from vpo_ray.records import SPLITS
from vpo_ray.stages import spec
from vpo_ray.stages.curate import InputError, preview
from vpo_ray.stages.spec import ChainName, StageSpec, draft_model, evolving_model
from vpo_ray.stream.placement import no_such_labels

MEASURE = "not known: run a few queries (--set queries.limit=20 --out PROBE), then give --ledger PROBE"


@dataclass
class StagePlan:
    """One stage of the stream, one beside it (labelling, drafting, evolution, previews), or a training phase.

    rows: at most, unless `expected`; None where not known. seconds: replica-seconds a row. size:
    replicas, smallest and largest. key: the recipe's, of its pool. balanced: replicas on the cluster that
    was given.
    """

    name: str
    rows: int | None
    expected: bool
    seconds: Figure
    replica: Replica
    size: tuple[int, int]
    key: str = ""
    balanced: int | None = None

    @property
    def work(self) -> float | None:
        """Replica-hours."""
        if self.seconds.value is None or self.rows is None:
            return None
        return self.rows * self.seconds.value / 3600

    @property
    def gpu_hours(self) -> float | None:
        return None if self.work is None else self.work * self.replica.all_gpus

    def hours(self, replicas: int) -> float | None:
        return None if self.work is None else self.work / replicas


@dataclass
class Plan:
    """What `vpo plan` says. Hours are wall time; None where a figure that they need is not known.

    missing: a line for each file or model that is not on this machine. downloads: what of the recipe is
    published and not at a path here (a hub's model may be in the hub's cache).
    """

    recipe: Recipe
    queries: Counter[str] | None  # rows read, by split or dropped
    before: list[StagePlan]  # labelling, drafting, evolution and previews, where the recipe has them
    stages: list[StagePlan]
    training: list[StagePlan]
    video_bytes: Figure
    cluster: Cluster | None = None
    price: float | None = None
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    downloads: list[Published] = field(default_factory=list)

    @property
    def phases(self) -> list[StagePlan]:
        return [*self.before, *self.stages, *self.training]

    @property
    def videos(self) -> StagePlan:
        """The stage that renders."""
        return next(stage for stage in self.stages if stage.name == "render")

    @property
    def video_cost(self) -> float:
        """What a service takes for them, and for previews, by the recipe's prices."""
        render = self.recipe.render
        previews = sum(stage.rows or 0 for stage in self.before if stage.name == "preview")
        cheap = render.previewed().endpoint.cost if previews else 0.0
        return (self.videos.rows or 0) * render.endpoint.cost + previews * cheap

    @property
    def unknown(self) -> list[str]:
        """Stages whose time is not known."""
        return [stage.name for stage in self.phases if stage.work is None]

    @property
    def stream_hours(self) -> float:
        """Of sampling to scoring, by the slowest stage that is known: at least this long."""
        sizes = {stage.name: stage.balanced or stage.size[1] for stage in self.stages}
        return makespan({s.name: s.work for s in self.stages if s.work is not None}, sizes)

    @property
    def hours(self) -> float:
        """Of the whole run, at least: phases whose time is not known are not in it."""
        alone = [(s, s.size[1]) for s in self.before] + [(s, s.size[0]) for s in self.training]
        return self.stream_hours + sum(stage.hours(replicas) or 0.0 for stage, replicas in alone)

    @property
    def gpu_hours(self) -> float:
        """Of the stages that are known."""
        return sum(stage.gpu_hours or 0.0 for stage in self.phases)


def plan(
    recipe: Recipe,
    cluster: Cluster | None = None,
    ledger: str | None = None,
    price: float | None = None,
    queries: int | None = None,
    incomplete: bool = False,
) -> Plan:
    """Check a recipe and say what it will take, on a cluster if one is given.

    Args:
        ledger: run directory or ledger.json of a past run; the recipe's own when None.
        price: of a GPU-hour, in any currency.
        queries: so many are taken to be read, instead of looking.
        incomplete: plan what can be planned where files that the recipe names are not on this machine;
            `missing` of the plan lists them.

    Raises:
        PlanError: something that the recipe names is not there (or with `incomplete`: is there and cannot be
            used), the ledger is not, or the cluster has no room for the recipe; the message lists every
            problem.
    """
    problems = problems_of(recipe)
    missing, wrong = only_absent(recipe, problems)
    refuse_problems(recipe, [*wrong, *missing] if wrong or not incomplete else [])
    past = read_ledger(recipe, ledger)
    counts, exact = _counted(recipe, queries, missing if incomplete else None)
    found: Counter[str] | None = None if counts is None else Counter()
    for name, number in (counts or {}).items():
        found = found or Counter()
        found[name if name in SPLITS else "dropped"] += number
    gpu_type = cluster.gpu_type if cluster else recipe.render.pool.accelerator_type
    stages = list(_stages(recipe, found, past, gpu_type))
    training = list(_training(recipe, found, past))
    before = [*_before(recipe, counts, past), *_previews(recipe, found, past, gpu_type)]
    made = Plan(
        recipe, found, before, stages, training, bytes_per_video(recipe), cluster, price, missing=missing
    )
    if not exact:
        made.notes.append(
            "queries: at most, as near duplicates, languages, the subset and words that are not here wait "
            "for `vpo curate`"
        )
    made.downloads = downloads(recipe)[0]
    made.notes += [*hub_ids(recipe), *absent_measures(recipe), *_endpoint_notes(recipe)]
    made.notes += _without_queries(recipe, found)
    if recipe.limits.max_cost is not None and made.video_cost > recipe.limits.max_cost:
        made.notes.append(f"limits.max_cost {recipe.limits.max_cost:g} stops the run before its last video")
    if recipe.evolves_first and recipe.evolve is not None and found is not None:
        made.notes.append(
            f"evolve: {found['sft']:,} queries with at most {recipe.evolve.most_videos} videos each, which "
            "are among those of render; a query ends where its prompts get no better (evolve.patience)"
        )
    if recipe.render.strategy == "adaptive":
        made.notes.append(_adaptive_note(made.videos))
    if recipe.render.preview is not None:
        made.notes.append(
            "render.preview: all candidates are previewed; in full at most all of the probe's "
            f"{recipe.render.preview.probe} queries and {recipe.render.preview.keep} prompts of the others, "
            "where previews agree with full renders"
        )
    if cluster is not None:
        refuse(made, cluster)
        _balance(made, cluster)
    return made


def _counted(
    recipe: Recipe, given: int | None, missing: list[str] | None
) -> tuple[Counter[str] | None, bool]:
    """Rows of queries by split or reason, and whether that is exact; None where they are not known, which is
    added to `missing`.

    Raises InputError where there is no such list and they cannot be read.
    """
    settings, absent = recipe.queries, absent_sources(recipe)
    whole = missing is None or "queries.rules.keywords" not in absent
    if not whole:
        settings = settings.model_copy(update={"rules": settings.rules.model_copy(update={"keywords": None})})
    if given is None and (missing is None or "queries.path" not in absent):
        found, exact = preview(settings)
        return found, exact and whole
    try:
        preview(settings)
    except InputError as error:
        if missing is not None:
            missing.append(str(error))
    most = [number for number in (given, settings.size, settings.limit) if number is not None]
    if not most:
        return None, True
    shares = settings.splits.model_dump()
    total = sum(shares.values())
    return Counter({name: round(min(most) * share / total) for name, share in shares.items()}), False


def _without_queries(recipe: Recipe, found: Counter[str] | None) -> Iterator[str]:
    """Which phases stop the run, as no query is for them."""
    sft = "draft" if recipe.drafts_first else "evolve" if recipe.evolves_first else None
    others = recipe.pair.also or (recipe.evolve is not None and recipe.evolve.pairs)
    for phase, split in ((sft, "sft"), (None if others else recipe.learns, "dpo")):
        if phase is not None and found is not None and not found[split]:
            yield f"{phase}: no query is in the {split} split, so it stops the run: see queries.splits"


def _of(counts: Counter[str] | None, name: str) -> int | None:
    return None if counts is None else counts[name]


def _before(recipe: Recipe, counts: Counter[str] | None, past: Ledger | None) -> Iterator[StagePlan]:
    """Labelling, drafting and evolution, where the recipe has them."""
    entering: dict[ChainName, int | None] = dict.fromkeys(("labelling", "drafting", "evolving"))
    if counts is not None:
        labelled = sum(counts[name] for name in (*SPLITS, "not in the subset", "over the limit"))
        rounds = recipe.evolve.rounds if recipe.evolve is not None else 0
        entering = {
            "labelling": labelled,
            "drafting": counts["sft"],
            "evolving": counts["sft"] * rounds,
        }
    for chain, rows in entering.items():
        # What columns label is asked of no judge.
        expected = chain == "drafting" or (chain == "labelling" and not recipe.queries.unsafe_columns)
        for stage in spec.stages(chain):
            if stage.is_due(recipe):
                yield _planned(stage, recipe, rows, expected, past)


def _stages(
    recipe: Recipe, counts: Counter[str] | None, past: Ledger | None, gpu_type: str | None
) -> Iterator[StagePlan]:
    """The stages of the stream, with the rows that evolution and previews give them."""
    queries = _of(counts, "dpo")
    rows, expected = None if queries is None else queries * recipe.sample.k, True
    beside = Counter(_evolved(recipe, _of(counts, "sft") or 0))
    if queries is not None and recipe.render.preview is not None:
        beside["score"] += _candidates_to_render(recipe, queries, past)[0]
    for stage in spec.stages("generation"):
        if stage.name == "render" and queries is not None:
            rows, expected = _videos(recipe, queries, past)
        more = beside[stage.name]
        all_rows = None if rows is None else rows + more
        made = _planned(stage, recipe, all_rows, expected and not more, past)
        if made.seconds.value is None and stage.name == "render":
            seconds = published_seconds(recipe.render, gpu_type)
            made.seconds = seconds if seconds.value else Figure(None, f"{MEASURE}; {seconds.source}")
        yield made


def _evolved(recipe: Recipe, queries: int) -> dict[str, int]:
    """Rows that the evolution of so many queries gives the stages of the stream, at most."""
    if recipe.evolve is None or not recipe.evolves_first:
        return {}
    videos = queries * recipe.evolve.most_videos
    return {
        "judge": queries * recipe.evolve.rounds * recipe.evolve.prompts,
        "render": videos,
        "score": videos,
    }


def _planned(
    stage: StageSpec, recipe: Recipe, rows: int | None, expected: bool, past: Ledger | None
) -> StagePlan:
    seconds = (past.seconds(stage.name) if past else None) or Figure(None, MEASURE)
    pool = stage.pool(recipe)
    replica = chat_replica(pool, stage.engine(recipe))
    return StagePlan(stage.name, rows, expected, seconds, replica, pool.size, f"{stage.key(recipe)}.pool")


def _videos(recipe: Recipe, queries: int, past: Ledger | None) -> tuple[int, bool]:
    """Videos to render, and whether that is more than an upper bound."""
    if recipe.render.preview is not None:
        return full_renders(recipe, queries, _candidates_to_render(recipe, queries, past)[0]), False
    candidates = queries * recipe.sample.k
    if past and recipe.render.strategy == "adaptive":
        each = past.videos_a_query("adaptive")
        if each is not None:
            return min(candidates, math.ceil(queries * each)), True
    bound, expected = _candidates_to_render(recipe, queries, past)
    return bound, expected and recipe.render.strategy == "all"


def _candidates_to_render(recipe: Recipe, queries: int, past: Ledger | None) -> tuple[int, bool]:
    """Aligned candidates, and whether that is more than an upper bound."""
    candidates = queries * recipe.sample.k
    aligned = past.share("aligned", "judge", "verdicts") if past else None
    return (candidates if aligned is None else math.ceil(candidates * aligned)), aligned is not None


def _previews(
    recipe: Recipe, counts: Counter[str] | None, past: Ledger | None, gpu_type: str | None
) -> Iterator[StagePlan]:
    """Previews, which the pool of the render stage makes before it renders in full."""
    if recipe.render.preview is None:
        return
    rows = None if counts is None else _candidates_to_render(recipe, counts["dpo"], past)[0]
    pool, seconds = recipe.render.pool, preview_seconds(recipe, past, gpu_type)
    yield StagePlan("preview", rows, False, seconds, pool_replica(pool), pool.size, "render.pool")


def _adaptive_note(render: StagePlan) -> str:
    if render.expected:
        return f"render.strategy adaptive: {render.rows or 0:,} videos by what that run's pairs took"
    return (
        "render.strategy adaptive: at most this many videos, as a query is rendered no further than its pair "
        "takes; a past run's --ledger says how many to expect"
    )


def _endpoint_notes(recipe: Recipe) -> Iterator[str]:
    llms = dict([("judge", recipe.judge), draft_model(recipe), evolving_model(recipe)])
    models: dict[str, ChatModel | Render] = {**llms, "render": recipe.render}
    for key, model in models.items():
        if model.named == "openai" and model.pool.num_gpus:
            yield f"{key}.pool.num_gpus {model.pool.num_gpus:g}: its replicas only ask an endpoint, set it 0"


def _training(recipe: Recipe, queries: Counter[str] | None, past: Ledger | None) -> Iterator[StagePlan]:
    """The training phases, one worker a replica."""
    for name, settings in (("sft", recipe.sft), ("dpo", recipe.dpo), ("rl", recipe.rl)):
        if settings is None:
            continue
        rows, expected = _examples(recipe, name, queries, past)
        seconds = (past.seconds(name) if past else None) or Figure(None, MEASURE)
        yield StagePlan(name, rows, expected, seconds, train_replica(settings), (settings.workers,) * 2)


def _examples(
    recipe: Recipe, phase: str, queries: Counter[str] | None, past: Ledger | None
) -> tuple[int | None, bool]:
    """Rows that a phase trains on, where known, and whether that is more than an upper bound."""
    if phase == "sft":
        data = recipe.sft.data if recipe.sft is not None else None
        if data is not None and data != EVOLVED:
            return count_rows(data), True
    if queries is None:
        return None, False
    if phase == "sft":
        made_by = "evolve" if data == EVOLVED else "draft"
        made = past.stages.get(made_by, {}) if past else {}
        if made.get("in") and made.get("out"):
            return math.ceil(queries["sft"] * made["out"] / made["in"]), True
        return queries["sft"], False
    if phase == "rl":
        return queries["dpo"], False
    pairs = past.stages.get("pair", {}) if past else {}
    if pairs.get("in") and pairs.get("pairs"):
        return math.ceil(queries["dpo"] * pairs["pairs"] / pairs["in"]), True
    return queries["dpo"] * _pairs_per_query(recipe), False


def _pairs_per_query(recipe: Recipe) -> int:
    pair = recipe.pair
    video = pair.video_per_query
    if pair.choice == "all":
        # The first of k is above k - 1 others, the second above k - 2, and so on.
        video = sum(
            recipe.sample.k - rank
            for rank in range(1, min(pair.ranks or recipe.sample.k, recipe.sample.k) + 1)
        )
    both = video + pair.text_per_query
    return both if pair.precedence == "both" else max(video, pair.text_per_query)


def pool_replica(pool: Pool) -> Replica:
    return Replica(pool.num_cpus, pool.num_gpus, pool.accelerator_type, labels=_sorted(pool.labels))


def chat_replica(pool: Pool, engine: Engine | None) -> Replica:
    """A vLLM engine: `tensor_parallel_size` times what the pool says on one node, and that for each
    pipeline parallel stage. Without an engine of its own a replica is what its pool says."""
    if engine is None:
        return pool_replica(pool)
    width, pieces = engine.tensor_parallel_size, engine.engine_kwargs.get("pipeline_parallel_size", 1)
    amounts = pool.num_cpus * width, pool.num_gpus * width
    return Replica(*amounts, pool.accelerator_type, pieces, _sorted(pool.labels))


def _sorted(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def train_replica(settings: Training) -> Replica:
    resources = {"CPU": 1.0, "GPU": float(settings.use_gpu), **settings.resources_per_worker}
    return Replica(resources["CPU"], resources["GPU"], labels=_sorted(settings.labels))


def refuse(made: Plan, cluster: Cluster) -> None:
    """Raises PlanError with every reason why this cluster cannot run the recipe."""
    problems = list(_misfits(made, cluster))
    if problems:
        raise PlanError(
            f"recipe {made.recipe.name} does not fit a cluster of {cluster}:\n  " + "\n  ".join(problems)
        )


def _misfits(made: Plan, cluster: Cluster) -> Iterator[str]:
    serve = made.recipe.serve
    replicas = {stage.key: stage.replica for stage in (*made.before, *made.stages)}
    replicas["serve.pool"] = chat_replica(serve.pool, serve.engine)
    alone = [line for key, replica in replicas.items() for line in _too_large(key, replica, cluster)]
    yield from alone
    if not alone:
        together = [stage.replica for stage in made.stages for _ in range(stage.size[0])]
        room = place(cluster, together)
        if room is False:
            asked = ", ".join(f"{s.name} {s.size[0]} x {_amount(s.replica)}" for s in made.stages)
            yield (
                f"the pools have no room at their smallest sizes, and all work at the same time: {asked}. "
                "Lower the sizes, or run the stages one by one (vpo sample, vpo judge, ...)"
            )
        elif room is None:
            made.notes.append("no way was found to place the pools' smallest sizes on these nodes")
    for phase in made.training:
        workers, replica = phase.size[0], phase.replica
        if place(cluster, [replica] * workers) is False:
            yield (
                f"{phase.name}.workers: {workers} workers ask {workers} x {_amount(replica)}, "
                f"the cluster has {cluster}"
            )
    for stage in made.before:
        if not alone and place(cluster, [stage.replica] * stage.size[0]) is False:
            yield f"{stage.key}: {stage.size[0]} x {_amount(stage.replica)} have no room on {cluster}"


def _too_large(key: str, replica: Replica, cluster: Cluster) -> Iterator[str]:
    if place(cluster, [replica]) is not False:
        return
    types = {node.gpu_type for node in cluster.nodes if node.gpus}
    if replica.gpu_type is not None and replica.gpu_type not in types:
        have = ", ".join(sorted(str(name or "GPUs of no type") for name in types)) or "no GPU"
        yield f"{key}: a replica asks a {replica.gpu_type} (accelerator_type), the cluster has {have}"
        return
    given = [dict(node.labels or ()) for node in cluster.nodes]
    if not any(Replica(labels=replica.labels).fits(node) for node in cluster.nodes):
        yield f"{key}: a replica asks {_amount(replica)}, and {no_such_labels(dict(replica.labels), given)}"
        return
    largest = max(cluster.nodes, key=lambda node: (node.gpus, node.cpus))
    pieces = f" {replica.pieces} times" if replica.pieces > 1 else ""
    yield (
        f"{key}: a replica asks {_amount(replica)} on one node{pieces}, "
        f"the largest node has {_amount(Replica(largest.cpus, largest.gpus))}"
    )


def _amount(replica: Replica) -> str:
    amounts = ((replica.gpus, "GPU"), (replica.cpus, "CPU"))
    given = [(n, name) for n, name in amounts if n and not math.isinf(n)]
    labels = ", ".join(f"{name}={value}" for name, value in replica.labels)
    summary = " and ".join(f"{n:g} {name}{'s'[: n > 1]}" for n, name in given) or "nothing"
    return summary + (f" on a node labelled {labels}" if labels else "")


def _balance(made: Plan, cluster: Cluster) -> None:
    """Fill in balanced sizes. Stages whose time is not known keep the recipe's smallest size."""
    counted = math.isfinite(cluster.cpus)
    limited = {s.name for s in made.stages if s.replica.gpus or (s.replica.cpus and counted)}
    work = {s.name: s.work for s in made.stages if s.work is not None and s.name in limited}
    fixed = {s.name: s.size[0] for s in made.stages if s.name not in work}
    sizes = balance(cluster, {s.name: s.replica for s in made.stages}, work, fixed)
    if sizes is None:
        made.notes.append("there is no room to balance the pools: the ones of unknown speed take it")
        return
    for stage in made.stages:
        stage.balanced = sizes[stage.name]
        if stage.size[1] > stage.size[0] and place(cluster, [stage.replica] * stage.size[1]) is False:
            made.notes.append(f"{stage.name}: the cluster has no room for its largest size, {stage.size[1]}")
