"""A query may carry an image: read once, checked, stored by content, and part of what the query is."""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3_server
from PIL import Image

from vpo_ray.files import image_files
from vpo_ray.files.folder import Folder, StorageError, join
from vpo_ray.files.image_files import ImageError, data_uri, decode_image, image_name, of_data_uri
from vpo_ray.loop.curation import curate_run
from vpo_ray.recipe import Queries, load
from vpo_ray.records import FEEDBACK, QUERY, Row, query_id, table
from vpo_ray.stages.curate import InputError, curate, preview
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.images import ImageStore, images_of
from vpo_ray.storage.run_dir import RunDir

ROOT = Path(__file__).parents[2]


def picture(colour: str = "red", kind: str = "PNG", size: tuple[int, int] = (6, 4), **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **how)
    return file.getvalue()


@pytest.mark.parametrize(("there", "named"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_may_be_in_another_normal_form_of_unicode(there: str, named: str, tmp_path: Path) -> None:
    """Files that were copied from macOS have decomposed names, and rows that were typed composed ones."""
    one = picture()
    settings = write(
        tmp_path,
        [{"query": "a cat", "image": f"pictures/{normalize(named, 'café.png')}"}],
        **{normalize(there, "café.png"): one},
    )
    queries, dropped = run(settings, tmp_path / "store")
    assert dropped == []
    assert queries[0]["image"] == image_name(one)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write(folder: Path, rows: list[dict[str, Any]], **images: bytes) -> Queries:
    (folder / "pictures").mkdir(exist_ok=True)
    for name, data in images.items():
        (folder / "pictures" / name).write_bytes(data)
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return Queries(path=str(folder / "q.jsonl"), image_column="image")


def run(settings: Queries, store: Path) -> tuple[list[Row], list[Row]]:
    curated = curate(settings, images=str(store))
    queries = [row for part in curated.queries(100) for row in part.to_pylist()]
    return queries, [row for part in curated.dropped(100) for row in part.to_pylist()]


def test_images_are_stored_by_content_and_are_part_of_the_id(tmp_path: Path) -> None:
    rows = [
        {"query": "a cat", "image": "pictures/one"},
        {"query": "a cat", "image": "pictures/two"},
        {"query": "a cat", "image": str(tmp_path / "pictures/again")},  # the first image by another name
        {"query": "a cat"},
        {"query": "a cat", "image": ""},
        {"query": "a dog", "image": f"file://{tmp_path}/pictures/one"},
    ]
    one, two = picture(), picture("blue", "JPEG")
    queries, dropped = run(write(tmp_path, rows, one=one, two=two, again=one), tmp_path / "store")
    table(queries, QUERY)
    assert [row["image"] for row in queries] == [image_name(one), image_name(two), None, image_name(one)]
    assert [row["reason"] for row in dropped] == ["duplicate", "duplicate"]
    assert queries[2]["query_id"] == query_id("a cat"), "a query without an image is what it was"
    assert len({row["query_id"] for row in queries}) == 4
    assert queries[0]["query_id"] == query_id("a cat", image_name(one).removesuffix(".png"))
    assert sorted(Folder(tmp_path / "store").files()) == sorted({image_name(one), image_name(two)})
    assert ImageStore(tmp_path / "store").read(image_name(two)) == two


def test_ids_with_an_image_never_change() -> None:
    assert query_id("a cat", "0" * 64) == "ebac26824b0a7a86cfd762bc27bdbdc9"


def test_a_bad_image_costs_its_row_and_says_why(tmp_path: Path) -> None:
    good = picture()
    images = {
        "good": good,
        "cut": picture(size=(60, 40), kind="JPEG")[:-200],
        "text": b"no image at all",
        "gif": picture(kind="GIF"),
        "bomb": bomb(10_000, 10_000),
        "wide": bomb(2**31 - 1, 2**31 - 1),
        "heavy": good + b"\0" * image_files.MAX_BYTES,
    }
    names = ["none", "cut", "text", "gif", "bomb", "wide", "heavy", "good", "", "x" * 300, "../pictures"]
    rows: list[dict[str, Any]] = [
        {"query": f"q{n}", "image": f"pictures/{name}"} for n, name in enumerate(names)
    ]
    odd: list[Any] = [3, ["pictures/good"], "nul\0", "half \ud800", "ftp//x://y"]
    rows += [{"query": f"odd{n}", "image": value} for n, value in enumerate(odd)]
    queries, dropped = run(write(tmp_path, rows, **images), tmp_path / "store")
    assert [row["query"] for row in queries] == ["q7"]
    assert [(row["row"], row["reason"]) for row in dropped] == [
        (1, "no such image"), (2, "broken image"), (3, "broken image"), (4, "broken image"),
        (5, "image too large"), (6, "image too large"), (7, "image too large"), (9, "no such image"),
        (10, "no such image"), (11, "no such image"), (12, "no path of an image"),
        (13, "no path of an image"), (14, "no path of an image"), (15, "no path of an image"),
        (16, "no such image"),
    ]  # fmt: skip
    assert dropped[0]["excerpt"].startswith(f"pictures/none: {tmp_path}/pictures/none: No such file")
    assert "10000 x 10000 pixels, an image has at most" in dropped[4]["excerpt"]
    assert Folder(tmp_path / "store").files() == [image_name(good)]


def test_near_duplicates_are_so_with_one_image_only(tmp_path: Path) -> None:
    texts = ("a red kite over the wide grey sea", "A red kite over the wide grey sea!")
    rows = [{"query": text, "image": f"pictures/{name}"} for name in ("one", "two") for text in texts]
    settings = write(tmp_path, rows, one=picture(), two=picture("blue"))
    near = settings.model_copy(
        update={"near_duplicates": Queries(path="x", near_duplicates={}).near_duplicates}
    )
    queries, dropped = run(near, tmp_path / "store")
    assert {row["image"] for row in queries} == {image_name(picture()), image_name(picture("blue"))}
    assert [row["reason"] for row in dropped] == ["near duplicate"] * 2


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_have_a_column_of_images(tmp_path: Path, kind: str) -> None:
    (tmp_path / "one.webp").write_bytes(picture(kind="WEBP"))
    path = tmp_path / f"q.{kind}"
    if kind == "csv":
        path.write_text("picture,query\none.webp,a cat\n,a dog\n", "utf-8")
    else:
        pq.write_table(pa.table({"query": ["a cat", "a dog"], "picture": ["one.webp", None]}), path)
    queries, _ = run(Queries(path=str(path), image_column="picture"), tmp_path / "store")
    assert [row["image"] for row in queries] == [image_name(picture(kind="WEBP")), None]
    with pytest.raises(InputError, match="no column 'image'"):
        run(Queries(path=str(path), image_column="image"), tmp_path / "store")
    (tmp_path / "q.txt").write_text("a cat", "utf-8")
    with pytest.raises(InputError, match=r"see queries\.image_column"):
        run(Queries(path=str(tmp_path / "q.txt"), image_column="image"), tmp_path / "store")


def test_a_plan_counts_without_reading_images(tmp_path: Path) -> None:
    counts, exact = preview(write(tmp_path, [{"query": "a cat", "image": "none.png"}]))
    assert (counts, exact) == ({"dpo": 1}, False)


def test_a_disk_that_fails_stops_curation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write(tmp_path, [{"query": "a cat", "image": "pictures/one"}], one=picture())
    opened = Path.open

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("vpo_ray.files.input_files.open", lambda path, how: (
        fails() if str(path).endswith("one") else opened(Path(path), how)), raising=False)  # fmt: skip
    with pytest.raises(InputError, match=r"queries\.image_column: .*one: Input/output error"):
        run(settings, tmp_path / "store")


# A run directory


@pytest.fixture
def uri() -> Iterator[str]:
    with s3_server.bucket("pictures") as options:
        yield f"s3://pictures/run?{options}"


def test_a_run_in_an_object_store_has_its_images(uri: str, tmp_path: Path) -> None:
    """The row and its image come from a store too, and the image goes along to candidates."""
    source = Folder(join(uri, "data"))
    source.write("a/q.jsonl", b'{"query": "a cat", "image": "../b/one.png"}\n{"query": "a dog"}')
    source.write("b/one.png", picture())
    queries = {"path": join(source.uri, "a/q.jsonl"), "image_column": "image"}
    recipe = load(ROOT / "jobs/recipes/tiny.yaml", [f"out={uri}", f"queries={json.dumps(queries)}"])
    directory = RunDir(recipe.out)
    curate_run(recipe, directory)
    rows = {row["query"]: row for row in directory.table("queries").rows()}
    name = rows["a cat"]["image"]
    assert (name, rows["a dog"]["image"]) == (image_name(picture()), None)
    assert images_of(directory).read(name) == picture()
    assert {row["image"] for row in candidates(rows["a cat"], recipe.sample, "policy", 1)} == {name}
    later = RunDir(directory.at("rounds/2"))
    later.write_json("round.json", {})
    assert images_of(later).folder.uri == images_of(directory).folder.uri, "rounds share them"
    images_of(directory).folder.write(name, b"other")
    with pytest.raises(StorageError, match="has other bytes than its name says"):
        images_of(directory).read(name)


def test_older_tables_have_no_image(tmp_path: Path) -> None:
    """A run directory that an earlier version wrote is read as before."""
    directory = RunDir(tmp_path / "run")
    old = pa.schema([field for field in FEEDBACK if field.name != "image"])
    rows = [{"candidate_id": "c", "query_id": "q", "query": "a cat", "k": 0, "seed": 1}]
    (tmp_path / "run/feedback").mkdir(parents=True)
    pq.write_table(table(rows, old), tmp_path / "run/feedback/part.parquet")
    (row,) = directory.table("feedback").rows()
    assert (row["query"], row["image"]) == ("a cat", None)


# Decoding


def test_a_picture_is_rgb_upright_and_on_white() -> None:
    turned = Image.new("RGB", (6, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    assert decode_image(file.getvalue()).size == (4, 6)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, "PNG")
    assert decode_image(clear.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    grey = io.BytesIO()
    Image.new("I;16", (2, 2)).save(grey, "PNG")
    assert decode_image(grey.getvalue()).mode == "RGB"


def test_data_uris_come_back_as_they_were() -> None:
    data = picture()
    assert of_data_uri(data_uri(image_name(data), data)) == data


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("https://169.254.169.254/latest", "given as a data: URI"),
        ("file:///etc/passwd", "given as a data: URI"),
        ("data:text/html;base64,AAAA", "given as a data: URI"),
        ("data:image/svg+xml;base64,AAAA", "given as a data: URI"),
        ("data:image/png,AAAA", "given as a data: URI"),
        ("data:image/png;base64,***", "no base64"),
        ("data:image/png;base64," + "A" * (image_files.MAX_BYTES * 3 // 2), "at most 32 MiB"),
    ],
)  # fmt: skip
def test_other_uris_are_refused(uri: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        of_data_uri(uri)
