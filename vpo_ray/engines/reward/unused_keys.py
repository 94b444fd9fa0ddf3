"""Keys of a reward that its builder does not look at: they are refused, as they would do nothing."""

from __future__ import annotations

from collections.abc import Iterator

from vpo_ray.recipe.base import refuse_unused
from vpo_ray.recipe.plugins import Modelled

# Looked at whoever builds the reward.
_OF_ALL = frozenset({"kind", "options", "batch_size", "pool", "least"})


def unused_keys(section: Modelled, kind: str, used: str) -> Iterator[str]:
    """A sentence where a section says anything but the default of a key that is not used.

    Args:
        kind: the builder, as a recipe names it.
        used: names of keys, with spaces between them.
    """
    others = [name for name in type(section).model_fields if name not in {*_OF_ALL, *used.split()}]
    try:
        refuse_unused(section, " ".join(others), f"with kind: {kind}")
    except ValueError as error:
        yield str(error)
