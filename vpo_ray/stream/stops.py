"""What ends a run, or the use of one node, where no row is to blame: a full disk, a model that does not load.

Every block of a stream has one column more than the tables: `stop`, null in all rows but those that met
such an error. They pass through the later stages untouched and no table has them; the driver stops at the
first, and the next run takes them again.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

import pyarrow as pa

from vpo_ray.records import Row, table

# `node`: the id of the node whose disk is full, where that is the reason: another node may have room.
STOP = pa.field("stop", pa.struct([("reason", pa.string()), ("node", pa.string())]))


def ends_run(error: BaseException) -> bool:
    """Whether an error says nothing of the rows that it met."""
    return getattr(error, "stops_run", False) or no_room(error)


def no_room(error: BaseException | None) -> bool:
    """Whether a full disk or a used up quota is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def stopped(row: Row, reason: str, error: BaseException) -> Row:
    """The row with the reason to stop; it names the node, as what is missing may be so on this one only."""
    import ray

    node = ray.get_runtime_context().get_node_id() if no_room(error) else None
    return {**row, STOP.name: {"reason": f"{reason} (on node {socket.gethostname()})", "node": node}}


def is_stopped(row: Row) -> bool:
    return row.get(STOP.name) is not None


def stored(row: Row) -> Row:
    """The row as its table has it."""
    return {name: value for name, value in row.items() if name != STOP.name}


def stream_block(rows: list[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a block of a stream whose tables have this schema."""
    return table(rows, schema.append(STOP))


def first_stop(block: pa.Table) -> dict[str, Any] | None:
    """The first reason to stop in a block, with its `node`."""
    found = block[STOP.name].drop_null()
    return found[0].as_py() if len(found) else None
