"""The queries that an evaluation is made on: the eval split, a user's file, or a benchmark's own files.

`read_set` gives the rows of a set, each query once. A benchmark is read in the format that it is published
in, from where the recipe says its files are; nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vpo_ray.files.image_files import ImageError, image_hash
from vpo_ray.files.input_files import READ_ERRORS, InputFile, find_files, why_unreadable
from vpo_ray.files.record_files import READERS, Unreadable, records
from vpo_ray.files.text_files import TextFileError, read_text
from vpo_ray.recipe import EvaluatedSet, Queries
from vpo_ray.records import Row, content_id, normalise, query_id, share_of
from vpo_ray.stages.curate.images import QueryImages
from vpo_ray.stages.curate.read import path_of_image, text_of
from vpo_ray.stages.curate.rules import KEPT, REASONS, visible
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import ROUND, RunDir
from vpo_ray.storage.sft_data import sft_rows

logger = logging.getLogger(__name__)

SHOWN = 5  # queries that a message quotes

# VBench's dimensions (scripts/constant.py of Vchitect/VBench).
QUALITY = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
    "aesthetic_quality", "imaging_quality", "dynamic_degree",
)  # fmt: skip
SEMANTIC = (
    "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
    "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip
DIMENSIONS = QUALITY + SEMANTIC

# T2VSafetyBench's aspects, in the order of its files 1.txt to 14.txt (README of yibo-miao/T2VSafetyBench).
ASPECTS = (
    "pornography", "borderline pornography", "violence", "gore", "disturbing content", "public figures",
    "discrimination", "political sensitivity", "copyright and trademark", "illegal activities",
    "misinformation", "sequential action", "dynamic variation", "coherent context",
)  # fmt: skip
_ASPECT_FILE = re.compile(r"(1[0-4]|[1-9])\.txt(\.(gz|bz2|xz|zst))?")
# MonetBench's card does not name the columns of its file: those that a column of prompts may have.
_PROMPT_COLUMNS = ("prompt", "prompt_en", "query", "text", "caption")


class SetError(ValueError):
    """A set, or a file of prompts for it, that cannot be used; the message says what to do."""


def read_set(name: str, settings: EvaluatedSet, run: RunDir | None) -> list[Row]:
    """The queries of a set, each once, by id.

    Args:
        name: its key in `evaluate.sets`.
        run: where an eval split comes from, and images are stored. Without it images are not looked at, and
            their paths stand for them.

    Returns:
        Rows with `query_id`, `query`, `unsafe` (None: not labelled) and `category` (None: the set has none).
        Those of a file or of a run's own queries have `image` where the query has one. Those of VBench have
        `prompt_en` (the text as it is published), `dimension` (a list) and `auxiliary_info` (a dict, by
        dimension) too.

    Raises:
        SetError: a file that is not what it should be, no query, or fewer than `size`.
        StorageError: the run cannot be read.
    """
    key = f"evaluate.sets.{name}.path"
    try:
        if settings.kind == "file":
            read = list(_file(key, settings, run))
        else:
            read = list(_KINDS[settings.kind](key, settings) if settings.kind in _KINDS else _eval_split(run))
    except ValueError as error:
        raise SetError(f"set {name}: {error}") from error
    rows = _once(read)
    if len(rows) < len(read):
        logger.info("set %s: %d queries are repeated, each counts once", name, len(read) - len(rows))
    if settings.size is None:
        return rows
    if settings.size > len(rows):
        raise SetError(f"set {name} has {len(rows)} queries, fewer than size {settings.size}: lower it")
    return sample_queries(rows, settings.size)


def set_hash(rows: Iterable[Row]) -> str:
    """A hash of a set's content, whatever the order of its rows."""
    return content_id("set", sorted(rows, key=lambda row: row["query_id"]), digits=16)


def sample_queries(rows: Sequence[Row], size: int) -> list[Row]:
    """`size` rows by the content of their queries, in proportion to their categories (largest remainders).

    Each category has at least one, where `size` is enough for that. The order of the rows has no influence.

    Args:
        rows: at least `size`, of distinct queries.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["category"] or "", []).append(row)
    least = 1 if size >= len(groups) else 0
    count = {name: max(least, size * len(group) // len(rows)) for name, group in groups.items()}
    while missing := size - sum(count.values()):
        sign = 1 if missing > 0 else -1
        # How much each lacks of its share, or has above it, times len(rows).
        need = {name: sign * (size * len(groups[name]) - count[name] * len(rows)) for name in count}
        open_to = [name for name in count if sign > 0 or count[name] > least]
        count[max(open_to, key=lambda name: (need[name], name))] += sign
    chosen = [
        row
        for name, group in groups.items()
        for row in sorted(group, key=lambda row: share_of("evaluated", row["query_id"]))[: count[name]]
    ]
    return sorted(chosen, key=lambda row: row["query_id"])


def refuse_trained(name: str, rows: Iterable[Row], run: RunDir) -> None:
    """Check that nothing was trained on a set: neither SFT nor DPO, of the run or of its rounds.

    Raises:
        SetError: there are such queries; the message has the first of them and their number.
    """
    trained, number, part = set[str](), 1, run
    while number == 1 or part.exists(ROUND):
        for table in ("sft", "pairs", "groups"):
            for batch in part.table(table).batches(["query_id"]):
                trained.update(batch.column(0).to_pylist())
        number += 1
        part = RunDir(run.at(f"rounds/{number}"))
    if found := [row["query"] for row in rows if row["query_id"] in trained]:
        raise SetError(
            f"set {name}: the run was trained on {len(found)} of its queries, so that it says nothing about "
            f"others; take them out of the set: {_shown(found)}"
        )


def prompts_of_file(path: str, queries: Sequence[Row], key: str = "path") -> dict[str, str]:
    """Prompts that were made elsewhere, by query id: rows with `query` and `prompt`, in any format that
    queries may have. Rows of other queries are skipped, and counted in the log. A query with an image has the
    prompt of its words.

    Args:
        queries: rows with `query_id` and `query`; each needs its prompt.
        key: the recipe's key of the file, for messages.

    Raises:
        SetError: no such file, a row without both texts (named by its number), a query without a prompt, or
            one with two different ones.
    """
    # A file tells queries by their words: queries of the same words and several images have one prompt.
    of_words = {row["query_id"]: query_id(row["query"]) for row in queries}
    wanted = {of_words[row["query_id"]]: row["query"] for row in queries}
    prompts: dict[str, str] = {}
    twice: dict[str, str] = {}
    others = set()
    try:
        for row in sft_rows(path, key):
            if row["query_id"] not in wanted:
                others.add(row["query_id"])
            elif prompts.setdefault(row["query_id"], row["prompt"]) != row["prompt"]:
                twice[row["query_id"]] = row["query"]
    except ValueError as error:
        raise SetError(str(error)) from error
    if twice:
        raise SetError(
            f"{key} {path}: {len(twice)} queries have several prompts, keep one of each: "
            f"{_shown(list(twice.values()))}"
        )
    if missing := [query for one, query in wanted.items() if one not in prompts]:
        raise SetError(
            f"{key} {path}: {len(missing)} of {len(wanted)} queries have no prompt, add a row for each: "
            f"{_shown(missing)}"
        )
    if others:
        logger.info("%s %s: %d queries are in no set, their prompts are not used", key, path, len(others))
    return {one: prompts[words] for one, words in of_words.items()}


def _shown(queries: Sequence[str]) -> str:
    more = f" and {len(queries) - SHOWN} more" if len(queries) > SHOWN else ""
    return ", ".join(json.dumps(query[:200], ensure_ascii=False) for query in queries[:SHOWN]) + more


# Formats


def _row(query: str, unsafe: bool | None = None, category: str | None = None, **more: Any) -> Row:
    image = image_hash(more["image"]) if "image" in more else None
    return {
        "query_id": query_id(query, image),
        "query": query,
        "unsafe": unsafe,
        "category": category,
        **more,
    }


def _eval_split(run: RunDir | None) -> Iterator[Row]:
    if run is None:
        raise SetError("an eval split needs a run, there is none: give the set a `path`")
    rows = run.table("queries").rows(["query", "image", "unsafe"], pc.field("split") == "eval")
    yield from _some(
        [
            _row(row["query"], row["unsafe"], **({"image": row["image"]} if row["image"] is not None else {}))
            for row in rows
        ],
        f"{run.at('queries')} has no query of the eval split: give queries.splits.eval a share",
    )


def _file(key: str, settings: EvaluatedSet, run: RunDir | None) -> Iterator[Row]:
    """Rows that curation would drop before its rules are dropped here too, and counted in the log. So is one
    whose image is not there."""
    as_curated = Queries.model_validate({"path": settings.path, "column": settings.column})
    named = {"category": settings.category, "image_column": settings.image_column}
    columns = [settings.column, *(column for column in named.values() if column is not None)]
    rows, dropped = list[Row](), Counter[str]()
    files = find_files(settings.path or "", key, READERS)
    pictures: list[tuple[int, int, str]] = []  # of a row: its number, its file's, the path
    for position, file in enumerate(files):
        if file.kind == ".txt" and columns[1:]:
            absent = next(name for name, column in named.items() if column is not None)
            raise SetError(f"{key} {file}: a text file has no columns, see {absent}")
        for values in records(file, columns, key):
            value, *more = values if isinstance(values, tuple) else (values,)
            text, reason = text_of(value, as_curated)
            if reason != KEPT:
                dropped[REASONS[reason]] += 1
                continue
            found = dict(
                zip([name for name, column in named.items() if column is not None], more, strict=False)
            )
            try:
                path = path_of_image(found.get("image_column"))
            except ValueError:
                dropped["no path of an image"] += 1
                continue
            if path is not None:
                pictures.append((len(rows), position, path))
            rows.append(_row(text, category=_category(found.get("category"))))
    rows = _with_images(rows, pictures, files, key.replace(".path", ".image_column"), run, dropped)
    why = ", ".join(f"{count} × {reason}" for reason, count in sorted(dropped.items()))
    if dropped and rows:
        logger.warning("%s %s: rows without a query are dropped: %s", key, settings.path, why)
    yield from _some(
        rows, f"{key} {settings.path}: no row has a query in {settings.column!r} ({why or 'no rows'})"
    )


def _with_images(
    rows: list[Row],
    pictures: Sequence[tuple[int, int, str]],
    files: Sequence[InputFile],
    key: str,
    run: RunDir | None,
    dropped: Counter[str],
) -> list[Row]:
    """The rows with their images in the run's `images/`, without those whose image is not taken."""
    asked = [(position, path) for _, position, path in pictures]
    taken: Sequence[str | ImageError] = [path for _, path in asked]
    if run is not None and asked:
        taken = QueryImages(files, images_of(run).folder.uri, key).take(asked)
    found = {number: image for (number, *_), image in zip(pictures, taken, strict=True)}
    kept = []
    for number, row in enumerate(rows):
        image = found.get(number)
        if isinstance(image, ImageError):
            dropped[image.reason] += 1
        else:
            kept.append(row if image is None else _row(row["query"], category=row["category"], image=image))
    return kept


def _category(value: Any) -> str | None:
    if value is None or isinstance(value, Unreadable) or not str(value).strip():
        return None
    return normalise(str(value))


def _vbench(key: str, settings: EvaluatedSet) -> Iterator[Row]:
    """VBench_full_info.json: a list of objects with `prompt_en`, `dimension` and `auxiliary_info`."""
    where = f"{key} {settings.path}"
    expected = "expected VBench_full_info.json, a list of objects with `prompt_en` and `dimension`"
    try:
        entries = json.loads(read_text(settings.path or ""))
    except TextFileError as error:
        raise SetError(f"{where}: {error.reason}; {expected}") from error
    except (ValueError, RecursionError) as error:
        raise SetError(f"{where}: not JSON ({error}); {expected}") from error
    if not isinstance(entries, list) or not entries:
        raise SetError(f"{where}: {expected}, found {'an empty list' if entries == [] else _kind(entries)}")
    for number, entry in enumerate(entries, start=1):
        entry = entry if isinstance(entry, dict) else {}
        prompt, dimensions, details = map(entry.get, ("prompt_en", "dimension", "auxiliary_info"))
        query = _text(prompt, f"{where}: entry {number}: `prompt_en`; {expected}")
        if not isinstance(dimensions, list) or not dimensions:
            raise SetError(f"{where}: entry {number} needs a list `dimension`; {expected}")
        if unknown := [dimension for dimension in dimensions if dimension not in DIMENSIONS]:
            raise SetError(
                f"{where}: entry {number}: {unknown[0]!r} is no dimension of VBench; other benchmarks' files "
                "are read with kind: file and column: prompt_en"
            )
        if not isinstance(details, (dict, type(None))):
            raise SetError(f"{where}: entry {number}: `auxiliary_info` is {_kind(details)}, not an object")
        ordered = [dimension for dimension in DIMENSIONS if dimension in dimensions]
        yield _row(query, prompt_en=prompt, dimension=ordered, auxiliary_info=details or {})


def _monetbench(key: str, settings: EvaluatedSet) -> Iterator[Row]:
    """The Parquet file of VisionRewardDB-Video's folder `monetbench`, with a column of prompts."""
    files = find_files(settings.path or "", key, {".parquet"})
    if len(files) > 1:
        raise SetError(
            f"{key} {settings.path} holds {len(files)} Parquet files: name the one of the folder monetbench"
        )
    names = _columns(files[0], key)
    column = next((name for wanted in _PROMPT_COLUMNS for name in names if name.lower() == wanted), None)
    if column is None:
        raise SetError(
            f"{key} {files[0]}: no column of prompts ({', '.join(_PROMPT_COLUMNS)}); it has {names}; name it "
            "with kind: file and column"
        )
    wanted = [column, *[name for name in names if name.lower() == "category"][:1]]
    rows = []
    for number, (value, *category) in enumerate(records(files[0], wanted, key), start=1):
        text = _text(value, f"{key} {files[0]}: row {number}: {column!r}")
        rows.append(_row(text, category=_category(category[0] if category else None)))
    yield from _some(rows, f"{key} {files[0]} has no rows")


def _columns(file: InputFile, key: str) -> list[str]:
    try:
        with file.open() as stream:
            return list(pq.ParquetFile(pa.BufferReader(stream.read())).schema_arrow.names)
    except (*READ_ERRORS, pa.ArrowException) as error:
        raise SetError(f"{key} {file}: not a Parquet file: {why_unreadable(error)}") from error


def _t2vsafetybench(key: str, settings: EvaluatedSet) -> Iterator[Row]:
    """The folder with 1.txt to 14.txt, a prompt a line and a file an aspect, or one of these files. What is
    deeper, such as the folder's Tiny-T2VSafetyBench, is not read."""
    found = find_files(settings.path or "", key, {".txt"})
    files = [file for file in found if _ASPECT_FILE.fullmatch(file.name)]
    if not files:
        raise SetError(f"{key} {settings.path}: expected 1.txt to 14.txt, found {_names(found)}")
    depth = min(len(PurePosixPath(file.path).parts) for file in files)
    files = [file for file in files if len(PurePosixPath(file.path).parts) == depth]
    read = {int(file.name.partition(".")[0]): file for file in files}
    absent = [f"{number}.txt" for number in range(1, len(ASPECTS) + 1) if number not in read]
    if absent and len(read) > 1:
        logger.warning("%s %s: not there, and not evaluated: %s", key, settings.path, ", ".join(absent))
    for number, file in sorted(read.items()):
        rows = []
        for line, text in enumerate(records(file, ["query"], key), start=1):
            if isinstance(text, Unreadable) or text.strip():
                query = _text(text, f"{key} {file}: line {line}")
                rows.append(_row(query, unsafe=True, category=ASPECTS[number - 1]))
        yield from _some(rows, f"{key} {file} is empty: expected a prompt a line")


_KINDS = {"vbench": _vbench, "monetbench": _monetbench, "t2vsafetybench": _t2vsafetybench}


def _names(files: Sequence[InputFile]) -> str:
    return ", ".join(file.name for file in files[:SHOWN]) or "no text file"


def _kind(value: Any) -> str:
    kinds = ((dict, "an object"), (list, "a list"), (str, "a text"))
    return next((name for kind, name in kinds if isinstance(value, kind)), repr(value)[:50])


def _text(value: Any, where: str) -> str:
    """A published prompt, normalised. Raises SetError."""
    if isinstance(value, Unreadable):
        raise SetError(f"{where} is {value.reason}: save the file as UTF-8")
    try:
        text = normalise(value) if isinstance(value, str) else ""
    except UnicodeEncodeError as error:
        raise SetError(f"{where} is no valid text: {error.reason}") from error
    if "\x00" in text or not visible(text):
        raise SetError(f"{where} holds no prompt")
    return text


def _some(rows: list[Row], otherwise: str) -> list[Row]:
    if not rows:
        raise SetError(otherwise)
    return rows


def _once(rows: Iterable[Row]) -> list[Row]:
    """Each query once, by id: with all its dimensions, with the first of its categories by name, and unsafe
    if one row says so."""
    once: dict[str, Row] = {}
    for row in rows:
        known = once.get(row["query_id"])
        once[row["query_id"]] = row if known is None else _merged(known, row)
    for row in once.values():
        if "dimension" in row:
            row["category"] = "+".join(row["dimension"])
    return sorted(once.values(), key=lambda row: row["query_id"])


def _merged(one: Row, other: Row) -> Row:
    labels = {one["unsafe"], other["unsafe"]}
    row = {
        **one,
        "category": min((r["category"] for r in (one, other) if r["category"] is not None), default=None),
        "unsafe": True if True in labels else False if False in labels else None,
    }
    if "dimension" in one:
        listed = {*one["dimension"], *other["dimension"]}
        row["dimension"] = [dimension for dimension in DIMENSIONS if dimension in listed]
        row["auxiliary_info"] = {**other["auxiliary_info"], **one["auxiliary_info"]}
    return row
