"""Images of queries in feedback: kept where the recipe says so, by content, until no row keeps them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pictures import huge_claim, picture, uri
from s3_server import bucket
from starlette.requests import Request
from test_costs import Alone, Engine
from test_feedback import OTHER, SILENT, STUDIO, answered, said, with_desk

from vpo_ray.evaluation.live import collect
from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.files.image_files import MAX_BYTES, data_uri
from vpo_ray.recipe import Feedback, Serve
from vpo_ray.records import Row
from vpo_ray.serve import feedback
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.feedback import FeedbackDesk
from vpo_ray.serve.images import AttachedImage, GivenImage, read_image
from vpo_ray.storage import feedback_tables
from vpo_ray.storage.feedback_tables import FeedbackTables
from vpo_ray.storage.images import ImageStore
from vpo_ray.storage.tables import Table


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPO_FEEDBACK_SECRET", "a secret of the tests")
    monkeypatch.setattr(feedback, "FLUSH_S", 0.01)


def given(colour: str, form: str = "PNG") -> GivenImage:
    return read_image(AttachedImage(uri(picture(colour, form=form)), "image"))


RED, BLUE, GREEN = given("red"), given("blue", "JPEG"), given("green", "WEBP")


def kept(folder: Path) -> set[str]:
    return set(FeedbackTables(str(folder)).images.sizes())


def names(*images: GivenImage) -> set[str]:
    return {image.name for image in images}


def noted(desk: FeedbackDesk, key: Any, image: GivenImage | None, query: str = "it drifts") -> str:
    id = desk.note(key, query, answered(), image=image).id
    assert id is not None
    return id


def test_images_are_kept_where_the_recipe_says_so(tmp_path: Path) -> None:
    def work(desk: FeedbackDesk) -> None:
        for image in (RED, BLUE, GREEN, RED, None):
            noted(desk, STUDIO, image)
        desk.note(SILENT, "it drifts", answered(), image=given("black"))
        desk.note(STUDIO, "it drifts", answered(None), image=given("black"))

    with_desk(tmp_path / "with", work, images=True)
    with_desk(tmp_path / "without", work)
    tables = FeedbackTables(str(tmp_path / "with"))
    assert kept(tmp_path / "with") == names(RED, BLUE, GREEN)
    assert tables.images.read(BLUE.name) == BLUE.data
    rows = {row["image"]: row["image_name"] for row in tables.answers.rows()}
    assert rows == {None: None, **{image.digest: image.name for image in (RED, BLUE, GREEN)}}
    assert not Folder(tmp_path / "without/images").files()
    without = list(FeedbackTables(str(tmp_path / "without")).answers.rows())
    assert {row["image"] for row in without} == rows.keys()
    assert {row["image_name"] for row in without} == {None}


def test_an_image_is_not_kept_without_its_words() -> None:
    assert not Feedback(store="x").images
    assert Serve.model_validate({"feedback": {"store": "x", "images": True, "anyone": True}})
    with pytest.raises(ValueError, match="images has no effect with queries: hash"):
        Feedback(store="x", queries="hash", images=True)


@pytest.mark.parametrize(
    "text",
    [
        uri(picture())[:-60],
        "data:image/png;base64," + "A" * (MAX_BYTES * 4 // 3 + 64),
        data_uri("x.png", huge_claim()),
        "https://example.org/cat.png",
        "../answers/x.parquet",
    ],
    ids=["cut", "heavy", "huge", "address", "path"],
)
def test_what_is_no_image_never_comes_to_feedback(text: str) -> None:
    with pytest.raises(ApiError):
        read_image(AttachedImage(text, "image"))


def test_an_image_stays_until_the_last_row_that_keeps_it_is_gone(tmp_path: Path) -> None:
    def work(desk: FeedbackDesk) -> str:
        desk.take(STUDIO, said(noted(desk, STUDIO, RED), rating="up"))
        noted(desk, OTHER, RED)
        noted(desk, OTHER, GREEN)
        return noted(desk, STUDIO, BLUE)

    id = with_desk(tmp_path, work, images=True)
    tables = FeedbackTables(str(tmp_path))
    assert tables.forget(answer_id=id.partition(".")[0]) == (1, 1)
    assert kept(tmp_path) == names(RED, GREEN)
    assert tables.forget(key="studio") == (2, 0)
    assert kept(tmp_path) == names(RED, GREEN), "the other key keeps it"
    assert tables.forget(key="other") == (2, 2)
    assert not Folder(tmp_path / "images").files()


def test_what_kept_a_hash_alone_keeps_no_image(tmp_path: Path) -> None:
    """Whoever allowed no image is not the reason that another's stays."""
    with_desk(tmp_path, lambda desk: noted(desk, OTHER, RED))
    with_desk(tmp_path, lambda desk: noted(desk, STUDIO, RED), images=True)
    assert kept(tmp_path) == names(RED)
    assert FeedbackTables(str(tmp_path)).forget(key="studio") == (1, 1)
    assert not kept(tmp_path)


def test_images_go_with_their_age(tmp_path: Path) -> None:
    with_desk(tmp_path, lambda desk: (noted(desk, STUDIO, RED), noted(desk, STUDIO, BLUE)), images=True)
    tables = FeedbackTables(str(tmp_path))
    (old,) = (row for row in tables.answers.rows() if row["image_name"] == RED.name)
    newer = {**old, "answer_id": "newer", "time": old["time"] + 100, "image_name": BLUE.name}
    tables.append(tables.answers, [newer], {BLUE.name: BLUE.data})
    assert tables.forget(before=old["time"] + 50) == (2, 1)
    assert kept(tmp_path) == names(BLUE)


@pytest.mark.parametrize("when", ["before", "while rows", "while images"])
def test_images_that_a_replica_still_holds_are_forgotten_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(feedback, "FLUSH_S", 600)
    tables, write, keep = FeedbackTables(str(tmp_path)), Table.append, ImageStore.keep

    def forget() -> None:
        monkeypatch.setattr(Table, "append", write)
        monkeypatch.setattr(ImageStore, "keep", keep)
        tables.forget(key="studio")

    def overtaken(self: Table, rows: Any) -> str:
        forget()
        return write(self, rows)

    def overtaken_later(self: ImageStore, name: str, data: bytes) -> None:
        forget()
        keep(self, name, data)

    async def ended() -> None:
        desk = FeedbackDesk(Feedback(store=str(tmp_path), images=True))
        noted(desk, STUDIO, RED)
        noted(desk, STUDIO, BLUE)
        noted(desk, OTHER, BLUE)
        if when == "before":
            tables.forget(key="studio")
        elif when == "while rows":
            monkeypatch.setattr(Table, "append", overtaken)
        else:
            monkeypatch.setattr(ImageStore, "keep", overtaken_later)
        await asyncio.wait_for(desk.close(), 10)

    asyncio.run(ended())
    assert [row["key"] for row in tables.answers.rows()] == ["other"]
    assert kept(tmp_path) == names(BLUE)


def test_a_store_that_fails_half_way_forgets_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows were appended, then the store failed, and its key was forgotten before the next try."""
    tables, keep = FeedbackTables(str(tmp_path)), ImageStore.keep
    calls: list[str] = []

    def failing(self: ImageStore, name: str, data: bytes) -> None:
        calls.append(name)
        keep(self, name, data)
        if len(calls) == 1:
            tables.forget(key="studio")
            keep(self, name, data)  # as if it had been under way
            raise StorageError("no network")

    monkeypatch.setattr(ImageStore, "keep", failing)

    def work(desk: FeedbackDesk) -> None:
        noted(desk, STUDIO, RED)

    with_desk(tmp_path, work, images=True)
    assert not list(tables.answers.rows())
    assert not kept(tmp_path)


@pytest.mark.parametrize("who", ["forget", "replica"])
def test_two_who_forget_at_once_forget_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """One replaces a part from which the other takes a row just then."""
    tables, write = FeedbackTables(str(tmp_path)), Table.append
    with_desk(
        tmp_path, lambda desk: [noted(desk, *one) for one in ((STUDIO, RED), (OTHER, BLUE))], images=True
    )
    rows = [*tables.answers.rows()]
    rows += [{**rows[0], "answer_id": "third", "key": "third", "image_name": GREEN.name}]
    tables.answers.replace([])

    def replacing(self: Table, kept: Any) -> str:
        if len(kept) == 2:  # without the first, which is forgotten
            monkeypatch.setattr(Table, "append", write)
            tables.forget(key="other")
        return write(self, kept)

    def storing(self: ImageStore, name: str, data: bytes) -> None:
        monkeypatch.setattr(ImageStore, "keep", keep)
        tables._forgotten.write_json(f"{feedback_tables._mark('key', 'studio')}.json", {"time": later})
        monkeypatch.setattr(Table, "append", replacing)
        keep(self, name, data)

    keep, later = ImageStore.keep, rows[0]["time"] + 1
    images = {image.name: image.data for image in (RED, BLUE, GREEN)}
    if who == "forget":
        tables.append(tables.answers, rows, images)
        monkeypatch.setattr(Table, "append", replacing)
        tables.forget(key="studio")
    else:
        monkeypatch.setattr(ImageStore, "keep", storing)
        tables.append(tables.answers, rows, images)
    assert [row["key"] for row in tables.answers.rows()] == ["third"]
    assert kept(tmp_path) == names(GREEN)


@pytest.mark.parametrize("at", range(1, 14))
def test_forgetting_and_keeping_at_once_leave_no_row_without_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Another replica keeps an image just when it is deleted, at any step of that."""
    tables = FeedbackTables(str(tmp_path))
    with_desk(tmp_path, lambda desk: (noted(desk, STUDIO, RED), noted(desk, STUDIO, BLUE)), images=True)
    (row,) = (row for row in tables.answers.rows() if row["image_name"] == RED.name)
    late: Row = {**row, "answer_id": "late", "key": "other"}
    steps = [0]
    busy: list[bool] = []

    def between(real: Any) -> Any:
        def call(self: Folder, *args: Any, **how: Any) -> Any:
            if not busy:
                steps[0] += 1
                if steps[0] == at:
                    busy.append(True)
                    tables.append(tables.answers, [late], {RED.name: RED.data})
                    busy.clear()
            return real(self, *args, **how)

        return call

    for name in ("read", "delete", "files", "write"):
        monkeypatch.setattr(Folder, name, between(getattr(Folder, name)))
    tables.forget(key="studio")
    monkeypatch.undo()
    found = {row["answer_id"] for row in tables.answers.rows()}
    assert kept(tmp_path) == (names(RED) if found else set())
    assert found == ({"late"} if steps[0] >= at else set())


def test_a_flood_of_images_keeps_rows_and_drops_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feedback, "MOST_IMAGE_BYTES", len(RED.data) + len(BLUE.data))

    def work(desk: FeedbackDesk) -> None:
        for image in (RED, BLUE, RED, GREEN):
            noted(desk, STUDIO, image)

    with_desk(tmp_path, work, images=True)
    rows = {row["image"]: row["image_name"] for row in FeedbackTables(str(tmp_path)).answers.rows()}
    assert rows == {RED.digest: RED.name, BLUE.digest: BLUE.name, GREEN.digest: None}
    assert kept(tmp_path) == names(RED, BLUE)
    assert "0 rows and 1 images of feedback were dropped" in caplog.text


def test_room_for_images_is_free_again_once_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "MOST_IMAGE_BYTES", max(len(one.data) for one in (RED, BLUE, GREEN)))

    async def run() -> None:
        desk = FeedbackDesk(Feedback(store=str(tmp_path), images=True))
        for image in (RED, BLUE, GREEN):
            noted(desk, STUDIO, image)
            assert desk.answers.task is not None
            await asyncio.wait_for(desk.answers.task, 10)
            assert desk.answers.images == {}

    asyncio.run(run())
    assert kept(tmp_path) == names(RED, BLUE, GREEN)


def test_tables_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have no column of names."""
    tables = FeedbackTables(str(tmp_path))
    older = tables.answers
    older.schema = older.schema.remove(older.schema.get_field_index("image_name"))
    row = {
        "answer_id": "a", "key": "studio", "time": 1.0, "checkpoint": "fp", "query_hash": "h", "query": "q",
        "image": RED.digest, "conditions": None, "prompt": "p", "alternatives": [], "safety": "pass",
    }  # fmt: skip
    older.append([row])
    assert [row["image_name"] for row in tables.answers.rows()] == [None]
    assert tables.forget(key="studio") == (1, 0)


def test_the_routes_keep_the_image_of_a_request(tmp_path: Path) -> None:
    settings = Serve(images="show", feedback=Feedback(store=str(tmp_path), images=True, anyone=True))

    async def asked(**fields: Any) -> int:
        ingress = Alone(Engine(), None, None, settings, ())
        body = json.dumps(fields).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        status: int = (await ingress.optimize(Request(scope, receive))).status_code
        assert ingress.feedback is not None
        await ingress.feedback.close()
        return status

    assert asyncio.run(asked(query="it drifts", image=uri(RED.data))) == 200
    assert asyncio.run(asked(queries=["it drifts", "a cat"], images=[uri(BLUE.data), None])) == 200
    assert asyncio.run(asked(query="it drifts", image=uri(GREEN.data)[:-60])) == 400
    rows = {(row["query"], row["image_name"]) for row in FeedbackTables(str(tmp_path)).answers.rows()}
    assert rows == {("it drifts", RED.name), ("it drifts", BLUE.name), ("a cat", None)}
    assert kept(tmp_path) == names(RED, BLUE)


def test_an_object_store_keeps_and_forgets_images() -> None:
    with bucket("feedback") as options:
        store, live = (f"s3://feedback/{name}?{options}" for name in ("store", "live"))
        tables = FeedbackTables(store)
        with_desk(store, lambda desk: (noted(desk, STUDIO, RED), noted(desk, OTHER, BLUE)), images=True)
        assert tables.images.sizes() == {image.name: len(image.data) for image in (RED, BLUE)}
        assert collect(store, live)["images"] == 2
        copies = ImageStore(f"s3://feedback/live/images?{options}")
        assert copies.read(RED.name) == RED.data
        assert tables.forget(key="studio") == (1, 1)
        assert collect(store, live)["images"] == 1
        assert set(copies.sizes()) == set(tables.images.sizes()) == names(BLUE)
