"""What a serving policy's users said, made into data: queries and their images, preference pairs, and figures
of the policy.

`vpo collect STORE --to DIR` reads the tables that an endpoint with `serve.feedback` fills. Whatever it writes
names the answers and opinions that it was made of.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vpo_ray.evaluation.statistics import share_interval
from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.files.image_files import MAX_BYTES, ImageError, image_hash, image_name, is_image_name
from vpo_ray.prompts.conditions import Conditions
from vpo_ray.records import PAIR, Row, content_id, normalise, pair_id, query_id
from vpo_ray.storage.feedback_tables import FeedbackTables
from vpo_ray.storage.images import ImageStore
from vpo_ray.storage.tables import Table

QUERIES, PAIRS, FIGURES, IMAGES = "queries.jsonl", "pairs", "figures.json", "images"
_READERS = 8  # images read at once; an object store takes tens of ms for each


def collect(store: str, folder: str) -> dict[str, Any]:
    """Write `queries.jsonl`, `images/`, `pairs` and `figures.json` to a folder, in place of what was there.

    Returns:
        The figures: counts of answers, opinions, queries, images and pairs, of what was left out and why, and
        for each checkpoint the shares of answers that were liked, disliked and edited, with intervals.

    Raises:
        StorageError: a table cannot be read, or the folder not be written: a run directory, or the store.
    """
    tables, out = FeedbackTables(store), Folder(folder)
    if out.uri == Folder(store).uri or out.exists("recipe.yaml"):
        # Its own pairs and images would be replaced.
        raise StorageError(
            f"{out.uri} is a run directory, or the store: give a folder of its own for what is collected"
        )
    tables.merge()
    answer_rows, opinion_rows = tables.rows()
    answers = {row["answer_id"]: row for row in answer_rows}
    opinions: dict[str, list[Row]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for row in opinion_rows:
        if row["answer_id"] in answers:
            opinions[row["answer_id"]].append(row)
        else:
            left_out["opinion on an answer that is not kept"] += 1
    copies = ImageStore(out.at(IMAGES))
    images = _copied(answers, tables.images, copies, left_out)
    pairs = {row["pair_id"]: row for row in _pairs(answers, opinions, images, left_out)}
    queries = list(_queries(answers, images))
    for name in copies.sizes().keys() - images:
        copies.folder.delete(name)
    out.write(QUERIES, "".join(json.dumps(row) + "\n" for row in queries).encode())
    Table(out.at(PAIRS), PAIR, "pair_id").replace(pairs[name] for name in sorted(pairs))
    figures = {
        "answers": len(answers),
        "opinions": sum(map(len, opinions.values())),
        "queries": len(queries),
        "images": len(images),
        "pairs": len(pairs),
        "left_out": dict(sorted(left_out.items())),
        "checkpoints": _of_checkpoints(answers, opinions),
    }
    out.write_json(FIGURES, figures)
    return figures


def is_collected(folder: str) -> bool:
    """Whether a folder has what `collect` writes. Raises StorageError."""
    return any(Folder(folder).exists(name) for name in (QUERIES, FIGURES))


def _copied(
    answers: Mapping[str, Row], store: ImageStore, copies: ImageStore, left_out: Counter[str]
) -> set[str]:
    """Copy the images that answers keep; returns the names of those that are images, of a size that is taken,
    and what their names say."""
    wanted = {
        name
        for row in answers.values()
        if (name := row["image_name"]) is not None
        and row["query"] is not None
        and is_image_name(name)
        and image_hash(name) == row["image"]
    }
    there, sizes = copies.sizes(), store.sizes()

    def copied(name: str) -> bool:
        if name in there:
            return True
        if not 0 < sizes.get(name, 0) <= MAX_BYTES:
            return False
        try:
            data = store.folder.read(name)
            good = image_name(data) == name
        except (FileNotFoundError, ImageError):
            return False
        except OSError as error:
            raise StorageError(f"cannot read the image {store.folder.at(name)}: {error}") from error
        if good:
            copies.keep(name, data)
        return good

    with ThreadPoolExecutor(_READERS) as readers:
        ordered = sorted(wanted)
        taken = {name for name, good in zip(ordered, readers.map(copied, ordered), strict=True) if good}
    if bad := len(wanted - taken):
        left_out["image that is not there, damaged or too large"] += bad
    return taken


def _shown(answer: Row, images: Collection[str]) -> bool:
    """Whether all that the policy was shown is there: the query's image, if it had one."""
    name = answer["image_name"]
    return answer["image"] is None or (name in images and image_hash(name) == answer["image"])


def _queries(answers: Mapping[str, Row], images: Collection[str]) -> Iterator[Row]:
    """Each query once, with whether the gate found it unsafe, and the path of its image from the folder. One
    whose image is not kept is left out."""
    found: dict[str, Row] = {}
    for name, row in sorted(answers.items()):
        if row["query"] is not None and _shown(row, images):
            image = {} if row["image"] is None else {"image": f"{IMAGES}/{row['image_name']}"}
            entry = found.setdefault(
                row["query_hash"], {"query": row["query"], **image, "unsafe": False, "answer_id": name}
            )
            entry["unsafe"] |= row["safety"] != "pass"
    yield from (found[name] for name in sorted(found))


def _pairs(
    answers: Mapping[str, Row],
    opinions: Mapping[str, list[Row]],
    images: Collection[str],
    left_out: Counter[str],
) -> Iterator[Row]:
    """An edited prompt over ours, a chosen candidate over the others, and a liked prompt over a disliked one
    of the same query, where they were asked for under the same conditions and the better one meets them."""
    liked: dict[tuple[str, str | None], dict[str, Row]] = defaultdict(dict)
    disliked: dict[tuple[str, str | None], dict[str, Row]] = defaultdict(dict)

    def met(answer: Row, better: str) -> bool:
        unmet = Conditions.stored(answer["conditions"]).unmet(better)
        if unmet:
            left_out["better prompt that does not meet the wishes of its request"] += 1
        return not unmet

    for name, said in sorted(opinions.items()):
        answer = answers[name]
        if answer["query"] is None:
            left_out["opinion on a query of which only a hash is kept"] += len(said)
            continue
        if not _shown(answer, images):
            left_out["opinion on a query with an image, which is not kept"] += len(said)
            continue
        candidates = [answer["prompt"], *answer["alternatives"]]
        votes = {row["rating"] for row in said if row["rating"]}
        if votes == {"up", "down"}:
            left_out["answer that was liked and disliked"] += 1
        elif votes:
            asked = answer["query_hash"], answer["conditions"]
            (liked if votes == {"up"} else disliked)[asked][answer["prompt"]] = answer
        for row in said:
            edited = (row["edited"] or "").strip()
            if edited and edited != answer["prompt"]:
                if met(answer, edited):
                    yield _pair(answer, edited, answer["prompt"], row["opinion_id"], name)
            elif edited:
                left_out["edited prompt that is the same"] += 1
            chosen = row["chosen"]
            if chosen is not None and chosen >= len(candidates):
                left_out["chosen candidate that is none of the answer"] += 1
            elif chosen is not None and met(answer, candidates[chosen]):
                for other in dict.fromkeys(candidates):
                    if other != candidates[chosen]:
                        yield _pair(answer, candidates[chosen], other, row["opinion_id"], name)
    for asked, better in sorted(liked.items(), key=str):
        for prompt, answer in sorted(better.items()):
            if not met(answer, prompt):
                continue
            for other, worse in sorted(disliked.get(asked, {}).items()):
                if other != prompt:
                    yield _pair(answer, prompt, other, answer["answer_id"], worse["answer_id"])


def _pair(answer: Row, chosen: str, rejected: str, chosen_by: str, rejected_by: str) -> Row:
    ids = f"said:{chosen_by}", f"said:{rejected_by}"
    query, image = normalise(answer["query"]), answer["image"]
    return {
        "pair_id": pair_id("text", *ids, chosen, rejected),
        "query_id": query_id(query, image),
        "query": query,
        "image": None if image is None else answer["image_name"],
        "chosen": chosen,
        "rejected": rejected,
        "kind": "text",
        "margin": None,
        "chosen_id": ids[0],
        "rejected_id": ids[1],
        "conditions": answer["conditions"],
    }


def _of_checkpoints(answers: Mapping[str, Row], opinions: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Of the answers that somebody spoke of: the shares that were liked, disliked and edited."""
    by: dict[str, list[tuple[Row, list[Row]]]] = defaultdict(list)
    for name, answer in answers.items():
        by[answer["checkpoint"] or ""].append((answer, opinions.get(name, [])))
    found = {}
    for checkpoint, rows in sorted(by.items()):
        spoken = [said for _, said in rows if said]
        shares = {
            "liked": sum(any(o["rating"] == "up" for o in said) for said in spoken),
            "disliked": sum(any(o["rating"] == "down" for o in said) for said in spoken),
            "edited": sum(any(o["edited"] for o in said) for said in spoken),
        }
        found[checkpoint or content_id("no checkpoint", digits=8)] = {
            "answers": len(rows),
            "spoken_of": len(spoken),
            **{name: _share(count, len(spoken)) for name, count in shares.items()},
        }
    return found


def _share(count: int, n: int) -> dict[str, float | int | None]:
    interval = share_interval(count, n)
    return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high, "n": n}
