"""Everything that the small world's recipes name: `vpo world FOLDER`.

`policy` is dequantised from a package; `video`, `other_video`, `judge` and `reward` are copies of what this
package ships.
`queries.jsonl` has users' queries to train on, `sft.jsonl` others with a teacher's prompts, and
`held_out.jsonl` queries for scenes that no clip of the video model's training shows, and `caption.txt` is the
policy's task prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from vpo_ray.world.folder import make_once
from vpo_ray.world.language import Query, query, teach
from vpo_ray.world.policy import make_smollm2
from vpo_ray.world.scene import scenes

WEIGHTS = Path(__file__).parent / "weights"
CAPTION = Path(__file__).parent / "caption.txt"
SEED = 5
# Rows of the files; a recipe may take the first ones only.
SFT, QUERIES, HELD_OUT = 60, 200, 150


def make_world(folder: str | Path) -> None:
    """Make all of it in a folder; models that are complete are kept.

    Raises:
        WorldError: see `make_smollm2` and `make_once`.
    """
    folder = Path(folder).expanduser()
    make_smollm2(folder / "policy")
    for shipped in sorted(path for path in WEIGHTS.glob("*") if path.is_dir()):
        make_once(folder / shipped.name, {"content": _digest(shipped)}, partial(_copy_model, shipped))
    write_texts(folder)


def _copy_model(shipped: Path, folder: Path) -> None:
    shutil.copytree(shipped, folder, dirs_exist_ok=True)
    if shipped.name == "other_video":
        complete_video(folder)


def complete_video(folder: Path) -> None:
    """Give the other video model its VAE, which is the first one's."""
    shutil.copytree(WEIGHTS / "video" / "vae", folder / "vae")


def write_texts(folder: Path) -> None:
    """Write the texts. No query is in two of them, and rows are the same on every machine."""
    rng, known = np.random.default_rng(SEED), set[str]()
    # An example that names more teaches more: what a teacher adds by chance cannot be learnt.
    taught = list(itertools.islice(_queries(False, (3, 5), known, rng), SFT))
    _write(folder / "sft.jsonl", ({"query": q.text, "prompt": teach(q, rng)} for q in taught))
    for name, held_out, rows in (("queries", False, QUERIES), ("held_out", True, HELD_OUT)):
        new = _queries(held_out, (2, 4), known, rng)
        _write(folder / f"{name}.jsonl", ({"query": q.text} for q in itertools.islice(new, rows)))
    shutil.copyfile(CAPTION, folder / CAPTION.name)


def _queries(
    held_out: bool, names: tuple[int, int], known: set[str], rng: np.random.Generator
) -> Iterator[Query]:
    """Queries that are not known yet, without end; `names` are the fewest and the most attributes of each."""
    possible = scenes(held_out)
    while True:
        asked = query(possible[int(rng.integers(len(possible)))], rng, names=names)
        if asked.text not in known:
            known.add(asked.text)
            yield asked


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
