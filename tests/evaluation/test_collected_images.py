"""What was said of answers to queries with an image becomes data with that image, which curation and training
read."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_live import answer, opinion

from vpo_ray.cli import main
from vpo_ray.evaluation.live import collect
from vpo_ray.evaluation.sets import read_set
from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.files.image_files import MAX_BYTES, image_hash, image_name
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import EvaluatedSet, Queries, Recipe, load
from vpo_ray.records import PAIR, Row, query_id
from vpo_ray.stages.curate import curate
from vpo_ray.storage.feedback_tables import FeedbackTables
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.tables import Table

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")


def picture(colour: str, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (120, 90), colour).save(file, kind)
    return file.getvalue()


RED, BLUE, GREEN = picture("red"), picture("blue", "JPEG"), picture("green")


def shown(name: str, data: bytes, **more: Any) -> Row:
    image = image_name(data)
    row = answer(name, "it drifts", f"A lantern of {name} drifts.", f"A paper lantern of {name}.")
    return {**row, "image": image_hash(image), "image_name": image, "query_hash": image, **more}


@pytest.fixture
def store(tmp_path: Path) -> FeedbackTables:
    tables = FeedbackTables(str(tmp_path / "store"))
    rows = [
        shown("a", RED),
        shown("b", BLUE, safety="rewritten", key="other"),
        shown("c", GREEN, image_name=None),
        shown("e", RED, key="other"),
        answer("d", "it drifts", "A leaf drifts."),
    ]
    tables.append(tables.answers, rows, {image_name(data): data for data in (RED, BLUE)})
    tables.opinions.append(
        [
            opinion("1", "a", edited="A red lantern drifts away."),
            opinion("2", "b", chosen=1, key="other"),
            opinion("3", "c", edited="A green lantern drifts."),
            opinion("4", "d", edited="A brown leaf drifts."),
            opinion("5", "a", rating="up"),
            opinion("6", "e", rating="down", key="other"),
        ]
    )
    return tables


def lines(live: Path) -> list[Row]:
    return [json.loads(line) for line in (live / "queries.jsonl").read_text("utf-8").splitlines()]


def recipe_of(tmp_path: Path, also: Path, *more: str) -> Recipe:
    images = ("queries.image_column=image", "policy.images=show")
    return load(TINY, [f"out={tmp_path / 'run'}", f"pair.also={also / 'pairs'}", *images, *more])


def test_queries_and_pairs_come_with_their_image(
    store: FeedbackTables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = tmp_path / "live"
    assert main(["collect", store.uri, "--to", str(live)]) == 0
    assert "5 answers, 6 opinions, 3 queries, 2 images, 4 pairs" in capsys.readouterr().out
    found = {row.get("image"): row["unsafe"] for row in lines(live)}
    red, blue = (f"images/{image_name(data)}" for data in (RED, BLUE))
    assert found == {red: False, blue: True, None: False}
    assert (live / red).read_bytes() == RED
    assert (live / blue).read_bytes() == BLUE
    pairs = {row["chosen"]: row for row in Table(str(live / "pairs"), PAIR, "pair_id").rows()}
    assert {chosen: row["image"] for chosen, row in pairs.items()} == {
        "A red lantern drifts away.": image_name(RED),
        "A paper lantern of b.": image_name(BLUE),
        "A brown leaf drifts.": None,
        "A lantern of a drifts.": image_name(RED),  # one liked, one not, of the same words and image
    }
    assert pairs["A red lantern drifts away."]["query_id"] == query_id(
        "it drifts", image_hash(image_name(RED))
    )
    assert pairs["A brown leaf drifts."]["query_id"] == query_id("it drifts")
    again = {path: path.read_bytes() for path in live.rglob("*") if path.is_file()}
    figures = collect(store.uri, str(live))
    assert again == {path: path.read_bytes() for path in live.rglob("*") if path.is_file()}
    assert figures["left_out"] == {"opinion on a query with an image, which is not kept": 1}


def test_curation_and_evaluations_read_what_was_collected(store: FeedbackTables, tmp_path: Path) -> None:
    live = tmp_path / "live"
    collect(store.uri, str(live))
    run = RunDir(tmp_path / "run")
    settings = Queries(path=str(live / "queries.jsonl"), image_column="image", unsafe_columns=["unsafe"])
    curated = curate(settings, images=images_of(run).folder.uri)
    queries = [row for part in curated.queries(100) for row in part.to_pylist()]
    assert not [row for part in curated.dropped(100) for row in part.to_pylist()]
    assert {row["image"]: row["unsafe"] for row in queries} == {
        image_name(RED): False, image_name(BLUE): True, None: False,
    }  # fmt: skip
    evaluated = EvaluatedSet(path=str(live / "queries.jsonl"), image_column="image")
    rows = read_set("live", evaluated, run)
    assert {row["query_id"] for row in rows} == {row["query_id"] for row in queries}
    assert {row.get("image") for row in rows} == {image_name(RED), image_name(BLUE), None}


def test_a_run_takes_pairs_with_their_images(store: FeedbackTables, tmp_path: Path) -> None:
    live = tmp_path / "live"
    collect(store.uri, str(live))
    recipe = recipe_of(tmp_path, live)
    run = RunDir(recipe.out)
    assert make_pairs(recipe, run) == 4
    assert {row["image"] for row in run.table("pairs").rows()} == {image_name(RED), image_name(BLUE), None}
    assert images_of(run).read(image_name(RED)) == RED
    # Another run's pairs are such a folder, too.
    other = recipe_of(tmp_path / "other", tmp_path / "run")
    assert make_pairs(other, RunDir(other.out)) == 4
    assert images_of(RunDir(other.out)).read(image_name(BLUE)) == BLUE


def test_a_folder_without_pairs_is_not_passed_over(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tmp_path / "typo")
    with pytest.raises(LoopError, match=r"pair\.also: .*typo/pairs holds no pairs"):
        make_pairs(recipe, RunDir(recipe.out))


def test_pairs_with_images_are_for_a_recipe_that_has_some(store: FeedbackTables, tmp_path: Path) -> None:
    live = tmp_path / "live"
    collect(store.uri, str(live))
    recipe = recipe_of(tmp_path, live, "queries.image_column=null")
    with pytest.raises(LoopError, match=r"name queries\.image_column, or write policy\.images: ignore"):
        make_pairs(recipe, RunDir(recipe.out))
    assert make_pairs(recipe_of(tmp_path, live, "queries.image_column=null", "policy.images=ignore"),
                      RunDir(recipe.out)) == 4  # fmt: skip


@pytest.mark.parametrize("fault", ["gone", "other", "no image", "name"])
def test_a_pair_whose_image_cannot_be_used_stops_pairing(
    store: FeedbackTables, tmp_path: Path, fault: str
) -> None:
    live = tmp_path / "live"
    collect(store.uri, str(live))
    path, name = live / "images" / image_name(RED), image_name(RED)
    table = Table(str(live / "pairs"), PAIR, "pair_id")
    if fault == "gone":
        path.unlink()
    elif fault == "other":
        path.write_bytes(BLUE)
    else:
        text = b"no image at all"
        name = "../../secrets" if fault == "name" else f"{content_hash(text)}.png"
        (live / "images" / name.rpartition("/")[2]).write_bytes(text)
        table.replace([{**row, "image": name if row["image"] else None} for row in list(table.rows())])
    recipe = recipe_of(tmp_path, live)
    with pytest.raises((StorageError, LoopError), match=r"the image|other bytes|no PNG|is no image's name"):
        make_pairs(recipe, RunDir(recipe.out))
    assert not list(RunDir(recipe.out).table("pairs").rows())
    assert name not in Folder(RunDir(recipe.out).at("images")).files()


def content_hash(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


@pytest.mark.parametrize("fault", ["gone", "other", "cut", "heavy", "no image", "path", "hash", "kind"])
def test_forged_images_of_a_store_are_left_out(store: FeedbackTables, tmp_path: Path, fault: str) -> None:
    live, folder = tmp_path / "live", tmp_path / "store/images"
    path, name = folder / image_name(RED), image_name(RED)
    changed = {}
    if fault == "gone":
        path.unlink()
    elif fault in ("other", "cut"):
        path.write_bytes(BLUE if fault == "other" else RED[:-20])
    elif fault == "heavy":
        with path.open("r+b") as file:
            file.truncate(MAX_BYTES + 1)  # a hole: it takes no room
    elif fault == "no image":
        text = b"no image at all"
        changed = {"image_name": f"{content_hash(text)}.png", "image": content_hash(text)}
        (folder / changed["image_name"]).write_bytes(text)
    elif fault == "path":
        (tmp_path / "secret").write_bytes(RED)
        changed = {"image_name": "../../secret", "image": "../../secret"}
    elif fault == "hash":
        changed = {"image_name": image_name(BLUE)}
    else:
        changed = {"image_name": name.replace(".png", ".webp")}
        (folder / changed["image_name"]).write_bytes(RED)
    if changed:
        rows = [
            {**row, **changed} if row["image_name"] == name else row for row in list(store.answers.rows())
        ]
        store.answers.replace(rows)
    figures = collect(store.uri, str(live))
    assert {row.get("image") for row in lines(live)} == {f"images/{image_name(BLUE)}", None}
    assert set(Folder(live / "images").files()) == {image_name(BLUE)}
    assert figures["left_out"]["opinion on a query with an image, which is not kept"] == 4
    for row in Table(str(live / "pairs"), PAIR, "pair_id").rows():
        assert row["image"] in (image_name(BLUE), None)


def test_what_is_forgotten_is_gone_from_what_was_collected(
    store: FeedbackTables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = tmp_path / "live"
    collect(store.uri, str(live))
    (live / "images/notes.txt").write_text("mine", "utf-8")
    assert main(["forget", store.uri, "--key", "other", "--collected", str(live)]) == 0
    assert "4 rows and 1 images are gone" in capsys.readouterr().out
    for folder in (live, tmp_path / "store"):
        files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert BLUE not in files
        assert RED in files
    assert (live / "images/notes.txt").exists()
    assert main(["forget", store.uri, "--key", "studio", "--collected", str(live)]) == 0
    assert "7 rows and 1 images are gone" in capsys.readouterr().out
    assert not list((tmp_path / "store/images").iterdir())
    assert [path.name for path in (live / "images").iterdir()] == ["notes.txt"]
