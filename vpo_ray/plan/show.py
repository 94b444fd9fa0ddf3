"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vpo_ray.plan.estimate import Plan, StagePlan
from vpo_ray.recipe.published import Published


def text(plan: Plan) -> str:
    """The plan in lines of at most about 100 characters, sources apart."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    recipe, read = plan.recipe, plan.queries
    yield f"recipe      {recipe.name}, fingerprint {recipe.fingerprint()}"
    yield f"run         {recipe.out}"
    if read is None:
        yield "queries     not known: they are not on this machine; give --queries N for a plan of so many"
    else:
        yield (
            f"queries     {read.total():,} rows read, {read['dropped']:,} dropped, {read['dpo']:,} for "
            f"feedback, {recipe.sample.k} candidates each"
        )
    yield f"cluster     {plan.cluster or 'not given: --gpus, --gpu-type and --cpus, or --address'}"
    yield ""
    more = f" {'balanced':>9} {'hours':>8}" if plan.cluster else ""
    yield f"{'stage':<8} {'rows':>17} {'s a row':>10} {'GPU-hours':>10} {'pool':>7} {'hours':>8}{more}  sure"
    yield from (_row(stage, plan) for stage in (*plan.before, *plan.stages))
    for phase in plan.training:
        settings = getattr(recipe, phase.name)
        how = f"ZeRO-{settings.zero_stage}, global batch {settings.global_batch}, lr {settings.lr:g}"
        yield f"{_row(phase, plan)}; {how}, {settings.epochs:g} epoch(s)"
    yield ""
    yield from _sources(plan)
    yield ""
    yield f"videos      {_videos(plan)}"
    yield f"wall time   {_wall(plan)}"
    yield f"price       {_price(plan)}"
    yield from (f"note        {note}" for note in plan.notes)
    if plan.downloads:
        yield ""
        yield f"published   {_gigabytes(plan)}; `vpo fetch RECIPE` downloads what the hub's cache lacks"
        yield from (f"  {published_line(each)}" for each in plan.downloads)
    if plan.missing:
        yield ""
        yield f"not here    {len(plan.missing)} of what the recipe names; see `vpo fetch RECIPE --list`"
        yield from (f"  {line}" for line in plan.missing)


def _row(stage: StagePlan, plan: Plan) -> str:
    bound = "" if stage.expected else "at most "
    rows = "not known" if stage.rows is None else f"{bound}{stage.rows:,}"
    size = "-".join(str(n) for n in dict.fromkeys(stage.size))
    line = (
        f"{stage.name:<8} {rows:>17} {_number(stage.seconds.value, '.3f'):>10} "
        f"{_number(stage.gpu_hours):>10} {size:>7} {_number(stage.hours(stage.size[1])):>8}"
    )
    if stage.balanced is not None:
        line += f" {stage.balanced:>9} {_number(stage.hours(stage.balanced)):>8}"
    return f"{line}  {stage.seconds.sure or 'not known'}"


def _gigabytes(plan: Plan) -> str:
    sizes = [each.gigabytes for each in plan.downloads if each.model is not None]
    known = [size for size in sizes if size is not None]
    more = (
        f", and {len(sizes) - len(known)} of a size that is not known here" if len(known) < len(sizes) else ""
    )
    return f"about {sum(known):,.1f} GB of weights{more}"


def published_line(each: Published) -> str:
    """A line for something to download: where it is, how large, under which licence."""
    where = f"https://huggingface.co/{each.model}" if each.model else each.url
    where = where or f"made of {', '.join(each.made_of)}"
    size = "size not known" if each.gigabytes is None else f"about {each.gigabytes:g} GB"
    gated = ", gated: accept it there, and set HF_TOKEN" if each.gated else ""
    return (
        f"{', '.join(each.keys)}: {where} ({size if each.model else 'small'}, licence: {each.license}{gated})"
    )


def _number(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _videos(plan: Plan) -> str:
    render, stage = plan.recipe.render, plan.videos
    bound = "about" if stage.expected else "up to"
    shape = f"{render.frames} x {render.width} x {render.height}, {render.steps} steps"
    if render.kind != "diffusers":
        shape = render.model or render.kind
    count = stage.rows or 0
    line = f"{bound} {count:,} of {shape}" if stage.rows is not None else f"not known how many of {shape}"
    if plan.video_bytes.value is None or stage.rows is None:
        return f"{line}; size {plan.video_bytes.source}"
    total = count * plan.video_bytes.value
    each = f"{plan.video_bytes.value / 1e6:.2f} MB each, {plan.video_bytes.source}"
    return f"{line}; {bound} {total / 1e9:,.1f} GB ({each})"


def _sources(plan: Plan) -> Iterator[str]:
    """Where the seconds are from, stages of the same source on one line."""
    stages: dict[str, list[str]] = {}
    for stage in plan.phases:
        stages.setdefault(stage.seconds.source, []).append(stage.name)
    yield from (f"{', '.join(names)}: {source}" for source, names in stages.items())


def _wall(plan: Plan) -> str:
    if not plan.hours:
        return "not known"
    sizes = "balanced pools" if any(s.balanced for s in plan.stages) else "the recipe's largest pools"
    bounded = [s.name for s in plan.phases if s.work and not s.expected]
    most = f" ({' and '.join(bounded)} at most)" if bounded else ""
    more = f"; {', '.join(plan.unknown)} not known" if plan.unknown else "; loading of models is not in it"
    return f"{plan.hours:,.1f} hours with {sizes}{most}{more}"


def _price(plan: Plan) -> str:
    if plan.video_cost:
        bound = "" if plan.videos.expected else "at most "
        videos = f"{plan.videos.rows:,} videos at {plan.recipe.render.endpoint.cost:g}"
        return f"{bound}{plan.video_cost:,.2f} for {videos}, paid to the service; {_gpu_price(plan)}"
    return _gpu_price(plan)


def _gpu_price(plan: Plan) -> str:
    if plan.price is None:
        return "give --price-per-gpu-hour"
    if not plan.gpu_hours:
        return "not known"
    without = f" ({', '.join(plan.unknown)} not known)" if plan.unknown else ""
    line = f"{plan.gpu_hours * plan.price:,.2f} for {plan.gpu_hours:,.2f} GPU-hours of work{without}"
    if plan.cluster is not None and plan.cluster.gpus:
        held = plan.cluster.gpus * plan.hours * plan.price
        line += f"; {held:,.2f} to hold all {plan.cluster.gpus:g} GPUs for {plan.hours:,.1f} hours"
    return line


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able values. What is not known is null, with its `source` saying what to do."""
    return {
        "recipe": plan.recipe.name,
        "fingerprint": plan.recipe.fingerprint(),
        "run": plan.recipe.out,
        "queries": None if plan.queries is None else {"read": plan.queries.total(), **plan.queries},
        "cluster": [_finite(node._asdict()) for node in plan.cluster.nodes] if plan.cluster else None,
        "stages": {stage.name: _stage(stage) for stage in plan.phases},
        "video_cost": plan.video_cost,
        "video_bytes": {"value": plan.video_bytes.value, "source": plan.video_bytes.source},
        "not_known": plan.unknown,
        "hours_of_known": plan.hours,
        "gpu_hours_of_known": plan.gpu_hours,
        "price_of_known": None if plan.price is None else plan.price * plan.gpu_hours,
        "notes": plan.notes,
        "missing": plan.missing,
        "downloads": [
            {key: value for key, value in asdict(each).items() if value not in (None, ())}
            for each in plan.downloads
        ],
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    replicas = stage.balanced or stage.size[1]
    return {
        "rows": stage.rows,
        "rows_are": "expected" if stage.expected else "at most",
        "seconds_per_row": stage.seconds.value,
        "source": stage.seconds.source,
        "sure": stage.seconds.sure or "not known",
        "gpu_hours": stage.gpu_hours,
        "gpus_per_replica": stage.replica.all_gpus,
        "pool": list(stage.size),
        "balanced": stage.balanced,
        "hours": stage.hours(replicas),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    known = {k: v for k, v in values.items() if k != "labels" or v is not None}
    if "labels" in known:
        known["labels"] = dict(known["labels"])
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in known.items()}
