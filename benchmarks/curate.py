"""Curation of a query log: time, memory and growth from 100,000 to 1,000,000 queries, on Ray Data.

    python benchmarks/curate.py
    python benchmarks/curate.py --sizes 10000 100000 --queries prompts.json

The queries are made of those of a file (by default the package's examples): their words are
exchanged, their clauses recombined, flags and labels added, and some come again, the same or nearly.
Everything of curation is on: flags, rules, languages, near duplicates, a diverse subset with its
unsafe share, splits, and the tables are written. Every size runs in a fresh process on a cluster of
two CPUs; memory is that of all processes together, shared pages counted once. Beside it, what
`query in list` takes to find the duplicates of 20,000 queries, as VPO's code does it. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from vpo_ray.loop import phases
from vpo_ray.recipe import Queries, Recipe, load
from vpo_ray.records import query_id
from vpo_ray.stages.curate import curate
from vpo_ray.stages.curate.duplicates import first_of_equal
from vpo_ray.stages.curate.read import query_files, read_batches
from vpo_ray.storage.run_dir import RunDir

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "vpo_ray/data/queries.jsonl"
SIZES = (100_000, 1_000_000)
CPUS = 2
SUBSET = 0.02  # share of the queries that is wanted; VPO took 20,000 of a million
REFERENCE = 20_000
FLAGS = ("-ar 16:9", "-motion 2", "-camera zoom in", "--ar 9:16", "-gs 14 -fps 24", "-neg blurry, text")
MB = 1e6

log = logging.getLogger("curate")


def synthetic(source: Path, count: int) -> Iterator[dict[str, Any]]:
    """Queries in the style of those in `source`: 8 % come again, 12 % nearly so, 20 % have flags."""
    rng = random.Random(0)
    settings = Queries(path=str(source))
    given = [
        text
        for batch in read_batches(query_files(settings), 0, settings)
        for text, reason in zip(batch["text"].to_pylist(), batch["reason"].to_pylist(), strict=True)
        if not reason
    ]
    words = [word for text in given for word in text.split()]
    clauses = [part.strip() for text in given for part in text.split(",") if part.strip()]
    recent: list[str] = []
    for _ in range(count):
        kind = rng.random()
        if recent and kind < 0.2:
            text = rng.choice(recent)
            if kind > 0.08:
                text = rng.choice(
                    (text.upper(), f"{text}.", f"{text} {rng.choice(words)}", text.replace("a ", "the "))
                )
        else:
            text = " ".join(w if rng.random() < 0.6 else rng.choice(words) for w in rng.choice(given).split())
            text = ", ".join([text, *rng.sample(clauses, rng.randrange(3))])
            if rng.random() < 0.2:
                text = f"{text} {rng.choice(FLAGS)}"
            if len(recent) < 50_000:
                recent.append(text)
            else:
                recent[rng.randrange(50_000)] = text
        yield {"query": text, "toxicity": round(rng.random() ** 4, 4)}


def write(path: Path, source: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in synthetic(source, count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def recipe_for(path: Path, out: Path, count: int) -> Recipe:
    queries = {
        "path": str(path),
        "unescape_html": True,
        "flags": True,
        "rules": {"min_words": 2, "max_words": 150, "max_special_share": 0.3, "max_digits": 12, "urls": True,
                  "languages": ["en"], "language_confidence": 0.9},
        "near_duplicates": {"threshold": 0.8},
        "size": int(count * SUBSET),
        "unsafe_columns": ["toxicity"],
        "unsafe_share": 0.1,
        "splits": {"sft": 0.45, "dpo": 0.45, "eval": 0.1},
        "workers": CPUS,
    }  # fmt: skip
    return load(ROOT / "jobs/recipes/tiny.yaml", [f"out={out}", f"queries={json.dumps(queries)}"])


class Memory:
    """The largest memory of this process and all under it while it is open, in MB."""

    def __init__(self) -> None:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1):
            self.peak = max(self.peak, sum(map(pss, family(os.getpid()))))


def family(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text("utf-8").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def pss(pid: int) -> float:
    """MB of a process, shared pages divided among those that share them; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / MB


def one_size(count: int, source: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "queries.jsonl"
        write(path, source, count)
        recipe = recipe_for(path, Path(folder) / "run", count)
        ray.init(
            address="local",
            num_cpus=CPUS,
            object_store_memory=10**9,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        run = RunDir(recipe.out)
        with Memory() as memory:
            start = time.perf_counter()
            phases.curate_queries(recipe, run)
            seconds = time.perf_counter() - start
        counts = run.read_json("meta/queries.json")
        assert sum(counts.values()) == count
        ray.shutdown()
        return {"seconds": round(seconds, 1), "peak_mb": round(memory.peak), **counts}


def against_reference(source: Path) -> dict[str, float]:
    """Finding the duplicates of 20,000 queries: a list that grows, curation's own way, all of curation."""
    rows = [row["query"].strip() for row in synthetic(source, REFERENCE)]
    start = time.perf_counter()
    found: list[str] = []
    for query in rows:
        if query not in found:
            found.append(query)
    theirs = time.perf_counter() - start
    start = time.perf_counter()
    keys = np.frombuffer(bytes.fromhex("".join(map(query_id, rows))), np.uint64).reshape(-1, 2)
    assert first_of_equal(keys).sum() == len(found)
    dedupe = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "queries.jsonl"
        path.write_text("".join(json.dumps({"query": row}) + "\n" for row in rows), "utf-8")
        start = time.perf_counter()
        counts = curate(Queries(path=str(path), workers=0)).counts()
        ours = time.perf_counter() - start
    assert counts["duplicate"] == len(rows) - len(found)
    return {
        "list_s": round(theirs, 2),
        "dedupe_s": round(dedupe, 3),
        "curate_s": round(ours, 2),
        "ratio": round(theirs / dedupe, 1),
        "ratio_curate": round(theirs / ours, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, memory and growth of curation.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="queries (%(default)s)")
    parser.add_argument("--queries", type=Path, default=EXAMPLES, help="file of queries to recombine")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if args.inside:
        result: dict[str, Any] = one_size(args.inside, args.queries)
    else:
        result = {"cpus": CPUS, "sizes": {}, "reference": against_reference(args.queries)}
        log.info("list membership: %s", result["reference"])
        for count in args.sizes:
            command = [sys.executable, __file__, "--inside", str(count), "--queries", str(args.queries)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result["sizes"][str(count)] = json.loads(output.splitlines()[-1])
            log.info("%d queries: %s", count, result["sizes"][str(count)])
        small, large = min(args.sizes), max(args.sizes)
        if large > small:
            growth = [result["sizes"][str(size)]["seconds"] for size in (small, large)]
            result["exponent"] = round(math.log(growth[1] / growth[0]) / math.log(large / small), 3)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
