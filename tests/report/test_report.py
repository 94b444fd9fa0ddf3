"""The report shows what the run's tables hold, as text, in a browser, at two widths."""

import re
import shutil
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_samples import clip
from html_page import ARABIC, ATTACK, Tags, until

from vpo_ray.loop.pairing import make_pairs
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import content_id, failed, query_id
from vpo_ray.report import build_report
from vpo_ray.stages.pair import pairs_of_query
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
QUERIES = (ATTACK, ARABIC, "word" * 200, "two lines\nof a query", "only a text pair", "failing")
QUESTION = 'Does the clip show what "[[prompt]]" asks for?'


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    checklist = [{"question": QUESTION, "weight": 0.9, "dimension": "alignment"}]
    checklist += [
        {"question": f"Is part {n} sharp?", "weight": 0.1, "dimension": "quality"} for n in range(9)
    ]
    (folder / "checklist.yaml").write_text(yaml.safe_dump({"questions": checklist}), "utf-8")
    where = [f"out={folder / 'run'}", f"reward.checklist.file={folder / 'checklist.yaml'}"]
    return load(TINY, [*where, *overrides])


def candidate(query: str, k: int, store: VideoStore, **more: Any) -> dict[str, Any]:
    identity = content_id(query, k)
    row = {
        "candidate_id": identity,
        "query_id": query_id(query),
        "query": query,
        "k": k,
        "seed": k,
        "prompt": f"Prompt {k} about {query}, filmed slowly.",
        "verdict": "aligned",
        "refined_prompt": None,
        "refined_fault": None,
        "refined_verdict": None,
        "score": None,
        "error": None,
        **more,
    }
    if row["verdict"] != "aligned" or row["error"] is not None:
        return row
    store.write(identity, clip(k), {})
    answers = [{"question": n, "yes": k == 0 or n > 8, "probability": 0.7} for n in range(1, 11)]
    dimensions = [{"name": "alignment", "score": 0.9 - 0.9 * k}, {"name": "quality", "score": 0.1}]
    where = {"video_key": identity, "video_uri": store.uri(identity)}
    return {**row, **where, "answers": answers, "dimensions": dimensions, "score": 1.7 - 0.9 * k}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: four video pairs, one text pair, errors, curves and an example."""
    folder = tmp_path_factory.mktemp("report")
    recipe = recipe_of(folder)
    run = RunDir(recipe.out)
    store = VideoStore(f"{run.uri}/videos")
    run.table("queries").append([{"query_id": query_id(q), "query": q, "split": "dpo"} for q in QUERIES])
    rows = [candidate(q, k, store) for q in QUERIES[:4] for k in range(2)]
    misaligned = {"verdict": "unsafe", "critique": f"It is harmful: {ATTACK}"}
    refined = {"refined_prompt": "A calm scene.", "refined_verdict": "aligned"}
    rows.append(candidate(QUERIES[4], 0, store, **misaligned, **refined))
    broken = candidate(QUERIES[5], 0, store, error="not yet")
    rows.append(failed(broken, "render", f"OutOfMemoryError: {ATTACK} 2.5 GiB"))
    run.table("feedback").append(rows)
    found = [pairs_of_query([r for r in rows if r["query"] == q], recipe.pair, Counter()) for q in QUERIES]
    run.table("pairs").append([pair for pairs in found for pair in pairs])
    run.write_metrics("sft", [{"step": n, "loss": 2.0 / n} for n in range(1, 40)])
    dpo = [{"step": n, "loss": 0.7 / n, "accuracy": 0.5 + n / 80, "margin": n / 10} for n in range(1, 40)]
    run.write_metrics("dpo", dpo)
    run.write_json("example.json", {"query": ATTACK, "sft": "short", "dpo": ARABIC})
    run.write_json("versions.json", {"ray": "2.60.0"})
    build_report(run, recipe)
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "run/report/index.html").read_text("utf-8")


def test_user_text_stays_text(html: str) -> None:
    page = Tags(html)
    assert [tag for tag, _ in page.found].count("script") == 1
    assert not [tag for tag, _ in page.found if tag == "img"]
    # Query, both prompts, critique, example and error reason.
    assert page.text.count(ATTACK) >= 5
    assert "49" not in page.text.split("Ledger")[0]


def test_nothing_is_fetched_from_elsewhere(html: str) -> None:
    for _, attributes in Tags(html).found:
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert not value.startswith(("http", "//", "data:", "/")), value


def test_the_same_run_gives_the_same_page(folder: Path, html: str) -> None:
    recipe = recipe_of(folder)
    path = build_report(RunDir(recipe.out), recipe)
    assert path == f"{folder / 'run'}/report/index.html"
    assert Path(path).read_text("utf-8") == html


def test_a_shared_store_is_copied_and_a_lost_video_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("videos", "report"))
    shutil.copytree(folder / "run/videos", tmp_path / "shared")
    lost = next((tmp_path / "shared").rglob("*.mp4"))
    lost.unlink()
    recipe = recipe_of(tmp_path, f"render.store={tmp_path / 'shared'}")
    page = Path(build_report(RunDir(recipe.out), recipe)).read_text("utf-8")
    videos = [attributes["src"] for tag, attributes in Tags(page).found if tag == "video"]
    assert len(videos) == 7
    assert page.count("no longer in the store") == 1
    for source in videos:
        name = str(source).partition("#")[0]
        assert (tmp_path / "run/report" / name).read_bytes()[4:8] == b"ftyp"


def test_no_pairs_says_why_by_count(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "pair.margin=5")
    run, full = RunDir(recipe.out), RunDir(f"{folder}/run")
    run.table("feedback").append(list(full.table("feedback").rows()))
    run.write_json("meta/pairs.json", {"reasons": {}})
    text = " ".join(Tags(Path(build_report(run, recipe)).read_text("utf-8")).text.split())
    assert "There is no pair. Of 6 queries none gave one: 4 all scores within the margin of 5" in text
    assert "1 every candidate failed" in text
    assert "No training curve yet" in text
    assert "Rows are not accounted for" in text


def test_rewards_that_disagree_are_shown_and_the_formula_that_decides(folder: Path, tmp_path: Path) -> None:
    terms = "{reward: 1, reward.alignment: -2, reward.quality: 1}"
    changes = [f"formula={{terms: {terms}}}", "pair={by: formula, dominance: none, margin: 0.1}"]
    recipe = recipe_of(tmp_path, *changes)
    run, full = RunDir(recipe.out), RunDir(f"{folder}/run")
    run.table("feedback").append(list(full.table("feedback").rows()))
    make_pairs(recipe, run)
    page = Path(build_report(run, recipe)).read_text("utf-8")
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    assert "reward and reward.alignment -1.00 -1.00 to -1.00 4" in text
    assert "reward and reward.quality not known 0" in text, "it is the same for all videos"
    assert "reward and reward.alignment disagree: among a query's videos" in text
    assert "margin 0.9" in text, "of the totals: -0.9 + 0.1 + 0.8 over 0 + 0.1 - 0.1"
    assert "chosen 0.9" in text


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    text = Tags(Path(build_report(RunDir(recipe.out), recipe)).read_text("utf-8")).text
    assert "No candidate has been sampled yet" in text


@pytest.mark.parametrize("width", [390, 1280])
def test_it_reads_well_in_a_browser(folder: Path, open_page: Any, problems: list[str], width: int) -> None:
    page = open_page(folder / "run/report/index.html", width)
    assert page.title() == "tiny · vpo_ray report"
    assert page.locator("article.pair").count() == 5
    assert page.locator("figure.chart").count() == 4
    assert page.locator("article.pair h3").all_inner_texts().count(ATTACK) == 1
    arabic = page.locator("article.pair h3", has_text=ARABIC)
    assert arabic.evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Every video is decoded, and a pair plays together.
    videos = page.locator("video")
    until(videos, "videos => videos.every(v => v.readyState >= 2 && v.videoWidth === 96)")
    pair = page.locator("article.pair", has=videos).first
    pair.locator("button.play").click()
    until(videos, "videos => videos.filter(v => !v.paused && v.currentTime > 0.1).length === 2")
    pair.get_by_text("stop both").click()
    assert pair.locator("video").evaluate_all("videos => videos.every(v => v.paused)")
    assert problems == []


def test_answers_that_differ_are_told_with_their_questions(html: str) -> None:
    text = Tags(html).text
    assert 'Does the clip show what "…" asks for?' in text
    assert "and 2 more" in text  # 8 of 10 answers differ, the 6 heaviest are shown
