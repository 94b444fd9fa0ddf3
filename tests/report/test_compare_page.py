"""The page of blind pairs: what it shows, what it hides, and what it does with votes."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import clip, sample, save, with_video
from html_page import ARABIC, ATTACK, Tags, until

from vpo_ray.evaluation import people
from vpo_ray.evaluation.people import VotesError
from vpo_ray.files.folder import Folder
from vpo_ray.report.compare_page import write_compare_page
from vpo_ray.storage.videos import VideoStore

QUERIES = [ATTACK, ARABIC, "</script>", "\u2028 two lines\nof 猫", *(f"query number {n}" for n in range(40))]


def data_of(page: Path) -> Any:
    html = page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def prompts(tmp_path: Path, **more: Any) -> Folder:
    return save(tmp_path / "run", [sample(q, p, **more) for q in QUERIES for p in ("sft", "dpo")])


@pytest.fixture
def videos(tmp_path: Path) -> Folder:
    """Three queries with two videos each; a fourth with one."""
    store = VideoStore(tmp_path / "run/videos")
    rows = [
        with_video(sample(query, policy), store, clip(number))
        for number, query in enumerate(QUERIES[:3])
        for policy in ("sft", "dpo")
    ]
    alone = [sample(QUERIES[3], "dpo", skipped="unsafe: not rendered")]
    return save(tmp_path / "run", [*rows, with_video(sample(QUERIES[3], "sft"), store, clip(3)), *alone])


def test_texts_stay_texts_and_no_policy_is_named(tmp_path: Path) -> None:
    rows = [sample(q, p, prompt=f"{n} {q}") for q in QUERIES for n, p in enumerate(("sft", "dpo"))]
    written = write_compare_page(
        save(tmp_path / "run", rows), Folder(tmp_path / "to"), "prompt", ["sft", "dpo"]
    )
    html = (tmp_path / "to/index.html").read_text("utf-8")
    assert written.uri == str(tmp_path / "to/index.html")
    assert [tag for tag, _ in Tags(html).found].count("script") == 2
    assert not [tag for tag, _ in Tags(html).found if tag == "img"]
    assert {pair["query"] for pair in data_of(tmp_path / "to/index.html")["pairs"]} == set(QUERIES)
    assert not re.search(r"\b(sft|dpo)\b", html)
    assert not re.search("https?:", html)
    assert "default-src &#39;none&#39;" in html


def test_left_and_right_follow_from_content(tmp_path: Path) -> None:
    evaluation = prompts(tmp_path)
    for folder in ("one", "two"):
        write_compare_page(evaluation, Folder(tmp_path / folder), "prompt", ["sft", "dpo"])
    one, two = ((tmp_path / folder / "index.html").read_bytes() for folder in ("one", "two"))
    assert one == two
    first = ["as dpo" in pair["left"] for pair in data_of(tmp_path / "one/index.html")["pairs"]]
    assert 10 < sum(first) < 34  # of 44


def test_a_limit_takes_the_same_pairs_first(tmp_path: Path) -> None:
    evaluation = prompts(tmp_path)
    for limit in (5, 10):
        write_compare_page(evaluation, Folder(tmp_path / str(limit)), "prompt", ["sft", "dpo"], limit=limit)
    few, more = (data_of(tmp_path / folder / "index.html")["pairs"] for folder in ("5", "10"))
    assert few == more[:5]
    assert len(more) == 10


def test_what_has_nothing_to_compare_is_counted(tmp_path: Path) -> None:
    rows = [sample("a", "sft", prompt="same"), sample("a", "dpo", prompt="same")]
    rows += [sample("b", "sft"), sample("b", "dpo", prompt=None), sample("c", "sft"), sample("c", "dpo")]
    # One query with other seeds and video models has one prompt.
    rows += [sample("c", p, seed=1, video_model=m) for p in ("sft", "dpo") for m in ("render", "wan")]
    written = write_compare_page(save(tmp_path / "run", rows), Folder(tmp_path), "prompt", ["sft", "dpo"])
    assert written.pairs == 1
    assert written.left_out == {"both have the same prompt": 1, "a policy has no prompt": 1}


def test_videos_are_copied_under_names_that_tell_nothing(videos: Folder, tmp_path: Path) -> None:
    written = write_compare_page(videos, Folder(tmp_path / "to"), "video", ["dpo", "sft"])
    assert written.pairs == 3
    assert written.left_out == {"a policy has no video": 1}
    for pair in data_of(tmp_path / "to/index.html")["pairs"]:
        for side in ("left", "right"):
            assert re.fullmatch(r"videos/[0-9a-f]{32}\.mp4", pair[side])
            assert (tmp_path / "to" / pair[side]).read_bytes()[4:8] == b"ftyp"


def test_a_lost_video_leaves_its_pair_out_and_a_moved_run_has_all(videos: Folder, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run", moved)
    evaluation = Folder(moved / "evaluation/e1")
    assert write_compare_page(evaluation, Folder(tmp_path / "all"), "video", ["dpo", "sft"]).pairs == 3
    shown = {row["video_key"] for row in people.samples_to_compare(evaluation) if row["query"] == QUERIES[0]}
    VideoStore(moved / "videos").delete(shown.pop())
    written = write_compare_page(evaluation, Folder(tmp_path / "some"), "video", ["dpo", "sft"])
    assert written.pairs == 2
    assert written.left_out["a video is no longer in the store"] == 1


@pytest.mark.parametrize(
    ("policies", "options", "says"),
    [
        (["sft", "dpo2"], {}, "no policy 'dpo2', but dpo, sft"),
        (["sft"], {}, "two policies or more"),
        (["sft", "sft"], {}, "two policies or more"),
        (["sft", "dpo"], {"only_set": "vbench"}, "no set 'vbench', but eval"),
        (["sft", "dpo"], {"limit": 0}, "a limit of 0"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path: Path, policies: Any, options: Any, says: str) -> None:
    with pytest.raises(VotesError, match=re.escape(says)):
        write_compare_page(prompts(tmp_path), Folder(tmp_path / "to"), "prompt", policies, **options)


def test_no_pair_and_no_samples_say_so(tmp_path: Path) -> None:
    with pytest.raises(VotesError, match="no pair of videos to show: 44 a policy has no video"):
        write_compare_page(prompts(tmp_path), Folder(tmp_path / "to"), "video", ["sft", "dpo"])
    with pytest.raises(VotesError, match="has no samples"):
        write_compare_page(Folder(tmp_path / "none"), Folder(tmp_path / "to"), "video", ["sft", "dpo"])


@pytest.fixture
def folder(videos: Folder, tmp_path: Path) -> Iterator[Path]:
    write_compare_page(videos, Folder(tmp_path / "to"), "video", ["dpo", "sft"])
    return tmp_path / "to"


@pytest.mark.parametrize("width", [390, 1280])
def test_votes_in_a_browser(folder: Path, open_page: Any, problems: list[str], width: int) -> None:
    page = open_page(folder / "index.html", width, accept_downloads=True)
    page.get_by_label("Your name").fill("Zoë <b>")
    page.get_by_role("button", name="Start").click()
    pairs = data_of(folder / "index.html")["pairs"]
    assert page.locator("#query").text_content() == pairs[0]["query"]
    until(page.locator("video"), "videos => videos.every(v => v.readyState >= 2 && v.currentTime > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.keyboard.press("2")
    page.locator(".vote", has_text="tie").click()
    page.reload()  # it goes on where it stopped
    assert page.locator("#place").text_content() == "3 of 3"
    page.keyboard.press("1")
    assert "Every pair" in page.locator("#end").text_content()
    page.keyboard.press("ArrowLeft")
    assert page.locator('[aria-pressed="true"]').text_content() == "1"
    page.keyboard.press("0")
    with page.expect_download() as download:
        page.locator("#download").click()
    given = json.loads(Path(download.value.path()).read_bytes())
    assert given["rater"] == "Zoë <b>"
    votes = [{"pair": pair["id"], "vote": v} for pair, v in zip(pairs, ["right", "tie", "tie"], strict=True)]
    assert given["votes"] == votes
    page.locator("#leave").click()
    assert page.get_by_label("Your name").is_visible()
    assert problems == []
