"""The endpoint shows a folder of `vpo compare page`, and nothing else of that machine."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from vpo_ray.serve.pairs import pairs_file

VIDEO = bytes(range(100))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "page"
    (folder / "videos").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>Which is better?</title>", "utf-8")
    (folder / "videos/ab12.mp4").write_bytes(VIDEO)
    (folder / "secret.txt").write_text("secret", "utf-8")
    (tmp_path / "ab.mp4").write_bytes(b"outside")
    return folder


@pytest.mark.parametrize(
    "name",
    ["secret.txt", "videos/none.mp4", "videos/../secret.txt", "../ab.mp4", "videos/../../ab.mp4",
     "/etc/hosts", "videos/", "index.html", "videos/ab12.mp4/x", "videos/AB12.mp4", "videos/ab12.mp4\n"],
)  # fmt: skip
def test_other_files_are_not_there(folder: Path, name: str) -> None:
    assert pairs_file(str(folder), name, None) is None


@pytest.mark.parametrize(
    ("asked", "status", "data", "part"),
    [
        (None, 200, VIDEO, None),
        ("bytes=0-1", 206, VIDEO[:2], "bytes 0-1/100"),
        ("bytes=90-", 206, VIDEO[90:], "bytes 90-99/100"),
        ("bytes=5-500", 206, VIDEO[5:], "bytes 5-99/100"),
        ("bytes=100-", 416, b"", "bytes */100"),
        ("bytes=9-5", 416, b"", "bytes */100"),
        ("bytes=-5", 200, VIDEO, None),
        ("lines=1-2", 200, VIDEO, None),
    ],
)
def test_videos_come_in_parts(
    folder: Path, asked: str | None, status: int, data: bytes, part: str | None
) -> None:
    answer = pairs_file(str(folder), "videos/ab12.mp4", asked)
    assert answer is not None
    assert (answer.status_code, answer.body) == (status, data)
    assert answer.headers.get("content-range") == part
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_the_endpoint_shows_the_page(endpoint: Callable[..., str], folder: Path) -> None:
    root = endpoint("pairs", compare=str(folder)).removesuffix("/v1")
    page = httpx.get(f"{root}/compare", follow_redirects=True)
    assert "Which is better?" in page.text
    assert page.headers["content-type"].startswith("text/html")
    assert str(page.url).endswith("/compare/")
    video = httpx.get(f"{root}/compare/videos/ab12.mp4", headers={"Range": "bytes=1-3"})
    assert (video.status_code, video.content) == (206, VIDEO[1:4])
    assert httpx.get(f"{root}/compare/videos/..%2f..%2fsecret.txt").status_code == 404
    assert httpx.get(f"{endpoint('none').removesuffix('/v1')}/compare/").status_code == 404
