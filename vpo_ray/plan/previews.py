"""What `render.preview` takes, for the plan: full renders at most, and how long a preview is rendered."""

from __future__ import annotations

from vpo_ray.plan.figures import Figure, Ledger, published_seconds
from vpo_ray.recipe import Recipe


def full_renders(recipe: Recipe, queries: int, previews: int) -> int:
    """Videos in full, at most: all of the probe's queries, `keep` of the others; no more than previews."""
    preview = recipe.render.preview
    assert preview is not None
    probe = min(preview.probe, queries)
    kept = (queries - probe) * min(preview.keep, recipe.sample.k)
    return min(previews, probe * recipe.sample.k + kept)


def preview_seconds(recipe: Recipe, past: Ledger | None, gpu_type: str | None) -> Figure:
    """Replica-seconds of rendering a preview: measured by a past run with these previews, or those of a full
    render, in proportion to steps, frames and pixels."""
    if past is not None and (found := past.preview_seconds()) is not None:
        return found
    full = (past.seconds("render") if past else None) or published_seconds(recipe.render, gpu_type)
    if full.value is None or recipe.render.kind == "openai":
        return Figure(None, "not known: a run of a few queries measures it")
    render, look = recipe.render, recipe.render.previewed()
    share = 1.0
    for name in ("steps", "frames", "height", "width"):
        share *= getattr(look, name) / getattr(render, name)
    source = f"{share:.3g} of a full render, by steps, frames and pixels; {full.source}"
    return Figure(full.value * share, source, "scaled")
