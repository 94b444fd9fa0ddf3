"""The split of a query: sft, dpo or eval, by its content."""

from __future__ import annotations

from vpo_ray.recipe import Splits
from vpo_ray.records import SPLITS, share_of


def split_of(key: str, splits: Splits) -> str:
    """The split of the queries of this key, in the shares that are wanted.

    The key is the first query id of a group of near duplicates, so that a group is in one split, and
    which does not change when other queries come or go.
    """
    shares = [getattr(splits, name) for name in SPLITS]
    point = share_of("split", key) * sum(shares)
    for name, share in zip(SPLITS, shares, strict=True):
        if point < share:
            return name
        point -= share
    return next(name for name, share in zip(SPLITS, shares, strict=True) if share)
