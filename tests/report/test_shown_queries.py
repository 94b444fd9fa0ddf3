"""The examples of an evaluation: three queries, every policy's prompt, and frames of two videos."""

import io
from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import POLICIES, clip, sample, save, with_video
from PIL import Image
from test_evaluation_page import made, scored

from vpo_ray.files.folder import Folder
from vpo_ray.report.evaluation_page import write_evaluation_page
from vpo_ray.report.examples import (
    FRAMES,
    GAP,
    HEIGHT,
    ShownQuery,
    examples_picture,
    examples_text,
    pick_examples,
)
from vpo_ray.storage.videos import VideoStore

GAINS = {"loses": -0.3, "gains": 0.4, "stays\x1b[31m": 0.0, "gains a little": 0.1, "loses a little": -0.1}


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[Folder, list[dict]]:
    store = VideoStore(tmp_path / "run/videos")
    rows = []
    for query, gain in GAINS.items():
        for k, policy in enumerate(POLICIES):
            row = sample(query, policy)
            if (query, policy) != ("loses", "query"):
                row = with_video(row, store, clip(k))
            rows.append(scored(row, clip=0.5 + gain * k / 2))
    return save(tmp_path / "run", rows), rows


def test_the_best_the_middle_and_the_worst_query_are_shown(evaluated):
    _, rows = evaluated
    examples = pick_examples(made(rows), rows)
    assert [e.query for e in examples] == ["gains", "stays\x1b[31m", "loses"]
    assert [value for _, value in examples[0].samples] == pytest.approx([0.5, 0.7, 0.9])
    text = examples_text(examples, 60)
    assert "\x1b" not in text
    for row in (row for row in rows if row["query"] in ("gains", "loses")):
        assert row["prompt"] in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 60


def test_a_policy_that_leaves_the_query_as_it_is_takes_no_line() -> None:
    rows = [{"policy": name, "prompt": text} for name, text in (("query", "a cat"), ("dpo", "a large cat"))]
    example = ShownQuery("gained most", "truth", "a cat", [(row, k / 2) for k, row in enumerate(rows)])
    assert examples_text([example], 80).splitlines() == [
        "gained most, by truth: a cat (query 0.00)",
        "  dpo      0.50  a large cat",
    ]


def test_of_two_queries_or_one_policy_there_are_no_examples(evaluated):
    _, rows = evaluated
    two = [row for row in rows if row["query"] in ("gains", "loses")]
    assert pick_examples(made(two), two) == []
    one = [row for row in rows if row["policy"] == "sft"]
    assert pick_examples(made(one), one) == []
    assert examples_text([], 80) == ""


def test_the_picture_has_frames_of_both_videos_and_grey_for_none(evaluated):
    folder, rows = evaluated
    picture = np.asarray(Image.open(io.BytesIO(examples_picture(pick_examples(made(rows), rows), folder))))
    width = HEIGHT * 96 // 64
    assert picture.shape == (3 * HEIGHT + 2 * GAP, 2 * FRAMES * width + GAP, 3)
    lost = picture[-HEIGHT:, : FRAMES * width]
    assert (lost == 211).all()
    first, last = picture[:HEIGHT, :width].astype(int), picture[:HEIGHT, 3 * width : 4 * width].astype(int)
    assert abs(first - last).max() > 60  # the thing has moved


def test_the_page_shows_the_picture(evaluated):
    folder, rows = evaluated
    write_evaluation_page(made(rows), rows, [], folder)
    assert folder.exists("examples.png")
    page = folder.read("report.html").decode()
    assert '<img class="frames" src="examples.png"' in page
    assert "img-src &#39;self&#39; file:" in page
