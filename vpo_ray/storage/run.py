"""A run directory as somebody sees it who uses what a run made; it changes nothing there.

run = vpo_ray.Run("runs/laptop")
run.table("pairs").to_pandas()
run.ledger["stages"]["render"]["videos"]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.recipe import Recipe, parse_stored
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import TABLES, RunDir
from vpo_ray.storage.videos import VideoStore

if TYPE_CHECKING:
    import pandas
    import polars


class Run:
    """A run directory: its tables, ledger, pairs and videos.

    Args:
        uri: folder or URI of a run, a round or an evaluation.

    Raises:
        StorageError: it cannot be opened, or holds no run.
    """

    def __init__(self, uri: str | Path) -> None:
        self.dir = RunDir(uri)
        if not self.dir.exists("versions.json"):
            raise StorageError(
                f"{self.dir.uri} is no run directory: it has no versions.json. Give the recipe's `out`"
            )

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    @property
    def uri(self) -> str:
        return self.dir.uri

    @property
    def recipe(self) -> Recipe:
        where = self.dir.at("recipe.yaml")
        return parse_stored(yaml.safe_load(self.dir.read("recipe.yaml")), where)

    @property
    def ledger(self) -> dict[str, Any]:
        """Rows in, out, dropped, skipped and errored of every stage, as `ledger.json` has them. Raises
        FileNotFoundError before the first command ended."""
        found: dict[str, Any] = self.dir.read_json("ledger.json")
        return found

    @property
    def tables(self) -> list[str]:
        """The names of the tables that hold rows."""
        return [name for name in TABLES if self.dir.table(name).parts()]

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A table as Arrow, each key once: a row that failed and was tried again counts once.

        Args:
            name: one of `records`' tables: queries, dropped, unlabelled, labels, drafts, evolutions, sft,
                candidates,
                verdicts, renders, feedback, pairs. One that has no rows (yet) is empty.

        Raises:
            ValueError: there is no such table or column.
            StorageError: a part is damaged.
        """
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        if unknown := set(columns or ()) - set(TABLES[name][0].names):
            raise ValueError(f"{name} has no column {', '.join(sorted(unknown))}")
        return self.dir.table(name).arrow(columns)

    def pandas(self, name: str, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """`table` for pandas."""
        return self.table(name, columns).to_pandas()

    def polars(self, name: str, columns: Sequence[str] | None = None) -> polars.DataFrame:
        """`table` for Polars, which must be installed."""
        import polars

        frame = polars.from_arrow(self.table(name, columns))
        assert isinstance(frame, polars.DataFrame)
        return frame

    def pairs(self) -> Iterator[Row]:
        """The preference pairs: `query`, `chosen`, `rejected`, `kind` ("text" or "video"), `margin`, ids."""
        return self.dir.table("pairs").rows()

    @property
    def videos(self) -> VideoStore:
        """The store of the run's videos, by `video_key` of its rows: `read(key)` gives the mp4's bytes."""
        return VideoStore(self.recipe.render.store or self.dir.at("videos"))

    def checkpoint(self) -> str | None:
        """Folder or URI of the policy that the run trained last: after the last round's DPO, else after
        SFT, or None."""
        for phase in ("rl", "dpo", "sft"):
            if Folder(found := self.dir.last_policy(phase)).exists("vpo.json"):
                return found
        return None
