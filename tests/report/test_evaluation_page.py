"""The page of an evaluation shows its results as text, what they cannot say, and the queries behind them."""

import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import clip, sample, save, with_video
from html_page import ARABIC, ATTACK, Tags, until

from vpo_ray.evaluation.figures import NOTHING_OUTSIDE, results_of
from vpo_ray.evaluation.people import votes_table
from vpo_ray.files.folder import Folder
from vpo_ray.recipe import Evaluation
from vpo_ray.records import content_id
from vpo_ray.report.evaluation_cards import ALIGNED, BEST, WORST, mark_words, query_cards, sorting_metric
from vpo_ray.report.evaluation_page import write_evaluation_page
from vpo_ray.storage.videos import VideoStore

QUERIES = [
    ATTACK,
    ARABIC,
    "一只猫在雨中散步",
    "a dog on a skateboard",
    "word" * 2000,
    "failing",
    "unsafe one",
]
Row = dict[str, Any]


def scored(row: Row, **values: float) -> Row:
    named = [{"name": name.replace("__", "."), "value": value} for name, value in values.items()]
    return {**row, "measures": named}


def made(
    rows: Sequence[Row], comparisons: Sequence[Row] = (), people: Sequence[Row] = (), **more: Any
) -> Any:
    policies = dict.fromkeys(row["policy"] for row in rows)
    context = {
        "id": "e1",
        "name": "tiny",
        "date": "2026-11-28",
        "sets": {name: {"n": 7, "hash": "h", "kind": "file"} for name in {row["set"] for row in rows}},
        "policies": {name: {"kind": name, "identity": f"of {name}"} for name in policies},
        "video_models": {row["video_model"]: "tiny" for row in rows},
        "config": {"judge": ATTACK},
        **more,
    }
    return results_of(rows, comparisons, Evaluation(resamples=1000), context, people)


def answer(query: Row, by: str, given: str, **more: Any) -> Row:
    row = {name: query[name] for name in ("set", "query_id", "query", "seed", "video_model")}
    row |= {"what": "video", "by": by, "a": "sft", "b": "dpo", "answer": given, "raw": None, "error": None}
    return {**row, "comparison_id": content_id(query["sample_id"], by, given, sorted(more)), **more}


def page_of(folder: Folder, results: Any, rows: Iterable[Row]) -> str:
    path = write_evaluation_page(results, rows, [], folder)
    assert path == folder.at("report.html")
    return Path(path).read_text("utf-8")


def visible(html: str) -> str:
    body = html[html.index("<body>") : html.rindex("<script>")]
    return " ".join(Tags(body).text.split())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, list[Row]]:
    """Two policies on seven queries; dpo fails on one, skips one, and loses on the attack."""
    folder = tmp_path_factory.mktemp("evaluation")
    store = VideoStore(folder / "run/videos")
    rows = []
    for number, query in enumerate(QUERIES):
        for k, policy in enumerate(("sft", "dpo")):
            row = sample(query, policy, prompt=f"{query}, {policy} says slowly")
            if query == "failing" and policy == "dpo":
                row |= {"error": f"OutOfMemoryError: {ATTACK}", "error_stage": "render"}
            elif query == "unsafe one" and policy == "dpo":
                row |= {"verdict": "unsafe", "critique": ATTACK, "skipped": "unsafe: not rendered"}
            else:
                row = with_video(row, store, clip(k))
                score = 0.1 * number + (-0.5 if query == ATTACK else 0.3) * k
                row = scored(row, reward=score, reward__motion=1 - score, clip=score, prompt__words=5)
            rows.append(row)
    return save(folder / "run", rows), rows


@pytest.fixture(scope="module")
def html(rows: tuple[Folder, list[Row]]) -> str:
    folder, samples = rows
    votes = [answer(samples[0], by, "b") for by in ("Ann", "<b>Bob</b>")]
    votes_table(folder).append(votes)
    return page_of(folder, made(samples, people=votes), samples)


def test_texts_stay_texts_and_nothing_is_fetched(html: str) -> None:
    page = Tags(html)
    assert [tag for tag, _ in page.found].count("script") == 1
    assert not [tag for tag, _ in page.found if tag in ("img", "b", "style") and _.get("onerror")]
    assert page.text.count("<img src=x onerror=") >= 6  # query, prompts, critique, error, config
    for _, attributes in page.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href"):
            assert not (attributes.get(name) or "").startswith(("http", "//", "data:", "/"))


def test_the_worst_losses_come_first_and_say_why(html: str) -> None:
    text = visible(html)
    cards = text[text.index("Queries, the worst losses first") :]
    # clip is from outside the training; without a video, dpo has the lowest score of the set.
    assert "sorted by the difference in clip" in cards
    found = re.findall(r"dpo ([+−][\d.]+|ties)", cards)
    signs = [float(number.replace("−", "-")) for number in found]
    assert signs == sorted(signs)
    assert signs[0] < 0 < signs[-1]
    assert len(signs) == 7
    assert "failed in render: OutOfMemoryError" in cards
    assert "unsafe: not rendered" in cards
    assert cards.count("counts as the worst") == 2
    assert "video preferred by <b>Bob</b>: dpo, Ann: dpo" in cards


def test_figures_come_with_intervals_and_marks(html: str) -> None:
    text = visible(html)
    assert "85.7 % 48.7 to 97.4 %" in text.replace("\u202f", " ")  # aligned, 6 of 7, Wilson
    assert "reward trained on" in text
    assert "clip trained on" not in text
    assert "2 as the worst" in text
    assert "2 votes of 2" in text
    assert "dpo against sft" in text
    assert "render: OutOfMemoryError" in text


def test_the_first_line_says_when_nothing_is_from_outside(rows: tuple[Folder, list[Row]]) -> None:
    folder, samples = rows
    own = [{**row, "measures": row["measures"][:2]} for row in samples]
    text = visible(page_of(folder, made(own), own))
    assert text.startswith(NOTHING_OUTSIDE)
    outside = visible(page_of(folder, made(samples), samples))
    assert outside.startswith("vpo_ray evaluation e1")


def test_the_same_results_give_the_same_page(rows: tuple[Folder, list[Row]]) -> None:
    folder, samples = rows
    results = made(samples)
    assert page_of(folder, results, samples) == page_of(folder, results, iter(samples[::-1]))


def test_a_lost_video_is_said_and_one_of_another_store_is_copied(
    rows: tuple[Folder, list[Row]], tmp_path: Path
) -> None:
    folder, samples = rows
    shutil.copytree(folder.at("../../videos"), tmp_path / "shared")
    shared = VideoStore(tmp_path / "shared")
    moved = [{**row, "video_uri": row["video_key"] and shared.uri(row["video_key"])} for row in samples]
    shared.delete(samples[0]["video_key"])
    there = save(tmp_path / "run", moved)
    page = page_of(there, made(moved), moved)
    sources = [a["src"] for tag, a in Tags(page).found if tag == "video"]
    assert len(sources) == 11
    assert "the video is no longer in the store" in page
    for source in sources:
        assert Path(there.at(str(source).partition("#")[0])).read_bytes()[4:8] == b"ftyp"


def test_null_figures_and_short_results_have_a_page(tmp_path: Path) -> None:
    nothing = {"value": None, "stderr": None, "ci_low": None, "ci_high": None, "n": 0, "note": "no queries"}
    nan = {**nothing, "value": math.nan}
    compared = {"set": "eval", "video_model": "render", "metric": "reward", "a": "sft", "b": "dpo"}
    compared |= dict.fromkeys(("difference", "ci_low", "ci_high", "p", "p_holm", "smallest_detectable"))
    results = {
        "id": "e", "name": "n", "date": "d", "sets": {"eval": {"n": 0, "hash": "", "kind": "file"}},
        "policies": {"sft": {}, "dpo": {}}, "video_models": {"render": "m"},
        "results": {"eval": {"render": {"sft": {"reward": nothing}, "dpo": {"reward": nan}}}},
        "comparisons": [{**compared, "n": 0, "win": None, "tie": None, "loss": None, "note": "too few"}],
        "higher_is_better": {"reward": True}, "trained_on": [], "signs": [], "warnings": [],
    }  # fmt: skip
    text = visible(page_of(Folder(tmp_path / "a/b/c"), results, []))
    assert "no queries" in text
    assert "too few" in text
    assert "no query with samples of two policies" in text
    empty = {**results, "results": {}, "comparisons": [], "sets": {}}
    assert "no policy has a sample" in visible(page_of(Folder(tmp_path / "a/b/c"), empty, []))


def test_a_large_evaluation_has_a_small_page(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(300)]
    policies = [f"policy-{number}" for number in range(6)]
    few = [
        scored(sample(f"query {number}", policy), reward=float(number % 7), prompt__words=3)
        for number in range(20)
        for policy in policies
    ]
    results = made(few)
    many = [
        scored(sample(f"query {number}", policy, prompt=" ".join(words[k:])), reward=math.sin(number * 7 + k))
        for number in range(1000)
        for k, policy in enumerate(policies)
    ]
    write_evaluation_page(results, many, [], Folder(tmp_path / "run/evaluation/e"))
    assert os.path.getsize(tmp_path / "run/evaluation/e/report.html") < 4e6
    cards = query_cards(results, many, [], Folder(tmp_path / "run/evaluation/e"))
    assert len(cards) == WORST // 5 * 5 + BEST // 5 * 5
    assert cards[0].difference < 0 < cards[-1].difference


def test_what_is_worth_sorting_by() -> None:
    rows = [scored(sample(q, p), reward=1.0, clip=2.0, prompt__words=3) for q in "ab" for p in ("sft", "dpo")]
    results = made(rows)
    group = next(iter(card.group for card in query_cards(results, rows, [], Folder("/nowhere/a/b"))))
    assert sorting_metric(results, group) == "clip"
    assert sorting_metric({**results, "trained_on": ["reward", "clip"]}, group) == "clip"
    assert sorting_metric({**results, "trained_on": ["clip"]}, group) == "reward"
    assert sorting_metric({**results, "higher_is_better": {}}, group) == ALIGNED


def test_lower_is_better_turns_the_difference() -> None:
    rows = [scored(sample("a", p), harm=value) for p, value in (("sft", 0.1), ("dpo", 0.9))]
    results = made(rows, higher_is_better={"harm": False})
    (card,) = query_cards(results, rows, [], Folder("/nowhere/a/b"))
    assert card.difference == pytest.approx(-0.8)
    assert [half.side for half in card.samples] == ["ahead", "behind"]


@pytest.mark.parametrize(
    ("text", "query", "other", "parts"),
    [
        ("A big dog runs.", "a DOG", "a small dog runs", "[A] <big> [dog] runs."),
        ("the red cat", "cat", None, "the red [cat]"),
        ("red red cat", "cat", "blue", "<red red> [cat]"),
        ("猫在雨中", "猫", "猫在", "[猫]在<雨中>"),
        ("", "cat", "cat", ""),
        (" <b> & cat\n", "b", "", " <[b]> & <cat>\n"),
    ],
)
def test_words_are_marked(text: str, query: str, other: str | None, parts: str) -> None:
    found = mark_words(text, query, other)
    assert "".join(part for _, part in found) == text
    ends = {"kept": "[{}]", "only": "<{}>", "": "{}"}
    assert "".join(ends[kind].format(part) for kind, part in found) == parts


@pytest.mark.parametrize("width", [390, 1280])
def test_it_reads_well_in_a_browser(
    rows: tuple[Folder, list[Row]], open_page: Any, problems: list[str], width: int
) -> None:
    folder, samples = rows
    more = [{**row, "set": "other", "sample_id": f"{row['sample_id']}-other"} for row in samples]
    page_of(folder, made([*samples, *more]), [*samples, *more])
    page = open_page(Path(folder.at("report.html")), width)
    assert page.title() == "tiny · vpo_ray evaluation"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("article").count() == 14
    page.locator("#where").select_option("other")
    assert page.locator("article:visible").count() == 7
    assert page.locator("#shown").text_content() == "7"
    arabic = page.locator("article:visible h3", has_text=ARABIC)
    assert arabic.evaluate("e => getComputedStyle(e).direction") == "rtl"
    arabic.scroll_into_view_if_needed()
    near = page.locator("article:visible", has=page.locator("h3", has_text=ARABIC)).locator("video")
    until(near, "videos => videos.length === 2 && videos.every(v => v.readyState >= 1)")
    assert problems == []
