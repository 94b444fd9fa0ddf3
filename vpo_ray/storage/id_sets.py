"""Sets of ids as sorted arrays, by which the driver compares tables.

An id takes 32 bytes. A set of strings would take five times that, and workers read an array in the object
store without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vpo_ray.storage.tables import Table

ID = "S32"


def id_set(ids: Iterable[str] = ()) -> np.ndarray:
    """Ids as a sorted array; duplicates are kept."""
    array = np.fromiter(ids, ID)
    array.sort()
    return array


def isin_sorted(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each id, whether it is in the sorted array `known`."""
    if not len(known):
        return np.zeros(len(ids), bool)
    return known.take(np.searchsorted(known, ids), mode="clip") == ids


def union(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The union of two sets."""
    new = other[~isin_sorted(other, one)]
    return np.sort(np.concatenate([one, new])) if len(new) else one


def stored_ids(table: Table, where: Any = None) -> np.ndarray:
    """The keys of a table's rows (of those that a pyarrow expression selects)."""
    return id_set(_keys(table, where))


def _keys(table: Table, where: Any) -> Iterator[str]:
    for batch in table.batches([table.key], where):
        yield from batch.column(0).to_pylist()
