"""The recipe section `render.preview`: a cheaper look at all candidates before a few are rendered in full."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from vpo_ray.recipe.base import Positive, Section


class Preview(Section):
    """A cheaper look first: all candidates of a query are rendered with these settings in place of the render
    section's, and scored, and those that decide are rendered in full: the best and the worst.

    The first `probe` queries are rendered in full as well, whole, and say how far previews order a query's
    candidates as full renders do. Below `agreement` the run stops.
    """

    steps: Positive | None = None
    frames: Positive | None = None
    height: Positive | None = None
    width: Positive | None = None
    guidance: Annotated[
        float | None, Field(ge=0, description="1 leaves guidance out, which halves the work of most models")
    ] = None
    request: dict[str, Any] = Field({}, description="of a service: what differs from endpoint.request")
    keep: Annotated[
        int,
        Field(ge=2, description="prompts of a query rendered in full: best, worst, second best, and so on"),
    ] = 2
    margin: Annotated[
        float | None,
        Field(
            ge=0,
            description="a query whose best and worst previews differ by no more is not rendered in full; "
            "all are when unset",
        ),
    ] = None
    probe: Positive = Field(8, description="queries that are rendered both ways, before all others")
    agreement: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="least share of a query's pairs of candidates, of those whose full scores differ, "
            "that previews order the same way; a tie of previews counts a half",
        ),
    ] = 0.9

    def looks(self) -> dict[str, Any]:
        """The keys of the render section that previews have of their own."""
        given = {name: getattr(self, name) for name in ("steps", "frames", "height", "width", "guidance")}
        return {name: value for name, value in given.items() if value is not None}
