"""What curation does to each batch of rows on its own, in any process: text, flags, rules, hashes."""

from __future__ import annotations

import html

import numpy as np
import pyarrow as pa

from vpo_ray import flags
from vpo_ray.files.image_files import ImageError, image_hash
from vpo_ray.recipe import Queries
from vpo_ray.records import FLAGS, normalise, query_id
from vpo_ray.stages.curate import diversity, duplicates, rules
from vpo_ray.stages.curate.images import QueryImages
from vpo_ray.stages.curate.read import EXCERPT, RAW
from vpo_ray.stages.curate.rules import KEPT, reason_code

KEY = pa.binary(16)  # a query id
TERMS = pa.large_list(pa.uint32())


def schema(settings: Queries) -> pa.Schema:
    """The columns of a prepared batch: only what these settings need."""
    fields = [*RAW, pa.field("key", KEY)]
    if settings.flags:
        fields.append(pa.field("flags", FLAGS))
    if (near := settings.near_duplicates) is not None:
        count, _ = duplicates.bands(near)
        fields += [pa.field("bands", pa.binary(8 * count)), pa.field("hashes", pa.binary(near.permutations))]
    if wants_terms(settings):
        fields.append(pa.field("terms", TERMS))
    return pa.schema(fields)


def wants_terms(settings: Queries) -> bool:
    return settings.size is not None and settings.diversity.method == "farthest_first"


def prepare_batch(batch: pa.Table, settings: Queries, images: QueryImages | None = None) -> pa.Table:
    """A batch of RAW with what comes from each row alone; columns of a dropped row are empty.

    Args:
        images: takes the images of rows; without it they are not looked at, and their paths stand for them.

    Returns:
        A table of `schema(settings)`, as many rows in the same order.
    """
    texts: list[str] = batch["text"].to_pylist()
    reasons = batch["reason"].to_numpy().copy()
    kept = np.flatnonzero(reasons == KEPT)
    taken: list[tuple[flags.Flag, ...] | None] = [None] * len(texts)
    for row in kept.tolist():
        texts[row], taken[row], reasons[row] = _text_of(texts[row], settings)
    kept = kept[reasons[kept] == KEPT]
    reasons[kept] = rules.apply(pa.array([texts[row] for row in kept], pa.large_string()), settings.rules)
    kept = kept[reasons[kept] == KEPT]
    pictures: list[str | None] = batch["image"].to_pylist()
    if images is not None:
        _take_images(images, batch["file"].to_pylist(), kept, texts, pictures, reasons)
        kept = kept[reasons[kept] == KEPT]
    for row in np.flatnonzero(reasons).tolist():
        texts[row] = texts[row] and texts[row][:EXCERPT]
    columns = {
        **{name: batch[name] for name in RAW.names},
        "text": pa.array(texts, pa.large_string()),
        "reason": pa.array(reasons, pa.int8()),
        "image": _fill(kept, [pictures[row] for row in kept], len(texts), pa.large_string()),
        "key": _fill(kept, [_key(texts[row], pictures[row]) for row in kept], len(texts), KEY),
    }
    wanted = schema(settings)
    left = [texts[row] for row in kept]
    if settings.flags:
        columns["flags"] = pa.array(
            [None if found is None else [flag._asdict() for flag in found] for found in taken], FLAGS
        )
    if settings.near_duplicates is not None:
        for name, values in zip(
            ("bands", "hashes"),
            duplicates.signatures(left, settings.near_duplicates, [pictures[row] for row in kept]),
            strict=True,
        ):
            kind = wanted.field(name).type
            columns[name] = _fill(kept, [row.tobytes() for row in values], len(texts), kind)
    if wants_terms(settings):
        columns["terms"] = _fill(kept, [diversity.terms(text) for text in left], len(texts), TERMS)
    return pa.table(columns, schema=wanted)


def _key(text: str, image: str | None) -> bytes:
    return bytes.fromhex(query_id(text, None if image is None else image_hash(image)))


def _take_images(
    images: QueryImages,
    files: list[int],
    kept: np.ndarray,
    texts: list[str],
    pictures: list[str | None],
    reasons: np.ndarray,
) -> None:
    """Put names of the store in place of the paths; a row without its image is dropped, and says why."""
    rows = [row for row in kept.tolist() if pictures[row] is not None]
    taken = images.take([(files[row], pictures[row] or "") for row in rows])
    for row, image in zip(rows, taken, strict=True):
        if isinstance(image, ImageError):
            texts[row], reasons[row] = f"{pictures[row]}: {image}", reason_code(image.reason)
        else:
            pictures[row] = image


def _text_of(text: str, settings: Queries) -> tuple[str, tuple[flags.Flag, ...] | None, int]:
    """The text as it goes on, its flags, and whether it still is a query."""
    found = None
    if settings.unescape_html:
        text = normalise(html.unescape(text))
    if settings.collapse_spaces:
        text = " ".join(text.split())
    if settings.flags:
        stripped, found = flags.split_flags(text)
        if not rules.visible(stripped):
            return text, found, reason_code("only flags" if found else "empty")
        text = stripped
    if not rules.visible(text):
        return text, found, reason_code("empty")
    if len(text) < settings.min_chars:
        return text, found, reason_code("too short")
    return text, found, KEPT


def _fill(kept: np.ndarray, values: list, length: int, kind: pa.DataType) -> pa.Array:
    """Values at the rows that are kept, null at all others."""
    column: list = [None] * length
    for row, value in zip(kept.tolist(), values, strict=True):
        column[row] = value
    return pa.array(column, kind)
