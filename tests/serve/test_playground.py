"""The playground in a real browser: a query is typed, an answer appears, and text stays text."""

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_endpoint import CHROMIUM, TINY

from vpo_ray.prompts.scripts import LANGUAGES
from vpo_ray.recipe import Serve, load
from vpo_ray.serve.keys import make_key
from vpo_ray.serve.optimize_schema import OptimizeRequest, parse_optimize
from vpo_ray.serve.playground import FOLDER, POLICY, page
from vpo_ray.serve.wishes import Wishes
from vpo_ray.storage.feedback_tables import FeedbackTables

ATTACK = """<script>document.title='owned'</script><img src=x onerror="document.title='owned'">"""


def test_the_page_names_nothing_from_elsewhere() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text("utf-8")
        for way in ("http", "innerHTML", "outerHTML", "insertAdjacent", "eval(", "onclick", "style="):
            assert way not in text
    assert "unsafe" not in POLICY


class Fields(HTMLParser):
    """The page's fields for wishes: kind and choices by name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.kinds: dict[str, str | None] = {}
        self.choices: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if name := given.get("data-wish"):
            self.kinds[name] = given.get("data-kind")
        elif tag == "option":
            self.choices.setdefault(list(self.kinds)[-1], []).append(given["value"] or "")


def test_the_page_offers_the_wishes_that_a_request_may_have() -> None:
    fields = Fields(page(Serve()).body.decode())
    schema = OptimizeRequest.model_json_schema()["properties"]
    kinds = {"integer": "number", "array": "list", "string": None}
    offered = {name: kinds[schema[name]["anyOf"][0]["type"]] for name in fields.kinds}
    assert fields.kinds == offered
    assert offered.keys() == {f.name for f in dataclasses.fields(Wishes)} - {"fields"} | {"format"}
    assert sorted(fields.choices["language"]) == ["", *sorted(LANGUAGES)]
    for name, values in fields.choices.items():
        for value in filter(None, values):
            parse_optimize(json.dumps({"query": "q", name: value}).encode(), ranking())


def ranking() -> Serve:
    rerank = {"model": "m", "endpoint": {"base_url": "http://here/v1"}}
    return Serve.model_validate({"best_of": {"n": 2, "rerank": rerank}})


def test_effort_is_offered_where_candidates_are_ranked() -> None:
    assert b'data-ranks="False"' in page(Serve()).body
    assert b'data-ranks="True"' in page(ranking()).body


def test_a_picture_is_offered_where_it_is_taken(tmp_path: Path) -> None:
    service: Any = {"store": str(tmp_path), "render": {"kind": "openai", "model": "m"}}
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}', "utf-8")
    of_text: Any = {"store": str(tmp_path), "render": {"model": str(tmp_path)}}
    for settings, sees, animates in (
        (Serve(), False, False),
        (Serve(images="show"), True, False),
        (Serve.model_validate({"videos": of_text}), False, False),
        (Serve.model_validate({"videos": service}), False, True),
        (
            Serve.model_validate({"videos": {"store": str(tmp_path), "render": {"model": "hub/x"}}}),
            False,
            True,
        ),
    ):
        assert f'data-sees="{sees}" data-animates="{animates}"' in page(settings).body.decode()


def test_what_is_typed_becomes_the_wishes_of_a_request(tmp_path: Path) -> None:
    """In the page's own code, by the Node.js that Playwright brings along."""
    import playwright

    typed = [
        *(["language", None, "zh"], ["max_words", "number", "40"], ["skip_if_words", "number", " "]),
        *(["format", None, ""], ["keep", "list", " ACME cola, red ，红球,, red"], ["avoid", "list", " , "]),
    ]
    (tmp_path / "wishes.mjs").write_text((FOLDER / "wishes.js").read_text("utf-8"), "utf-8")
    asked = f"console.log(JSON.stringify(wishesOf({json.dumps(typed)})))"
    (tmp_path / "ask.mjs").write_text(f'import {{ wishesOf }} from "./wishes.mjs";\n{asked}', "utf-8")
    node = Path(playwright.__file__).parent / "driver/node"
    done = subprocess.run([node, tmp_path / "ask.mjs"], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    made = json.loads(done.stdout)
    assert made == {"language": "zh", "max_words": 40, "keep": ["ACME cola", "red", "红球"]}
    assert parse_optimize(json.dumps({"query": "q", **made}).encode(), Serve()).wishes.language == "zh"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("the page is looked at in Chromium, and /usr/bin/chromium is not installed")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def locked(endpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An endpoint that asks for a key and rewrites flagged queries, and the key."""
    folder = tmp_path_factory.mktemp("playground")
    key, line = make_key("page")
    (folder / "keys").write_text(line, "utf-8")
    (folder / "words").write_text("knife\n", "utf-8")
    safety = {"query": "rewrite", "prompt": True, "keywords": str(folder / "words")}
    where = endpoint("locked", keys=str(folder / "keys"), safety=safety)
    return where.removesuffix("/v1") + "/", key


def opened(browser: Any, where: str, width: int) -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    origin = "/".join(where.split("/")[:3])
    page.on("request", lambda r: None if r.url.startswith((origin, "blob:")) else problems.append(r.url))
    page.goto(where)
    return page, problems


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Playwright's own waiting evaluates text in the page, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_was_kept_added_and_removed_is_marked(browser: Any) -> None:
    page = browser.new_page()
    code = (FOLDER / "difference.js").read_text("utf-8")

    def marked(query: str, prompt: str) -> Any:
        load = "([code, a, b]) => import('data:text/javascript,' + encodeURIComponent(code))"
        return page.evaluate(f"{load}.then((m) => m.difference(a, b))", [code, query, prompt])

    # Case and the punctuation behind a word do not make it another.
    assert marked("A red ball, please", "On grass a Red ball.") == [
        [["mark", "A red ball, "], ["del", "please"]],
        [["ins", "On grass "], ["mark", "a Red ball."]],
    ]
    assert marked("红球", "红色的球。") == [
        [["mark", "红球"]],
        [["mark", "红"], ["ins", "色的"], ["mark", "球。"]],
    ]
    assert marked("same", "same") == [[["mark", "same"]], [["mark", "same"]]]
    assert marked("a", "🎈 !") == [[["del", "a"]], [["ins", "🎈 !"]]]
    long = "语" * 5000
    assert marked(long, long) == [[["span", long]], [["span", long]]], "too long to compare"
    page.close()


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.parametrize("width", [390, 1280])
def test_a_query_is_typed_and_its_prompt_appears(brief: str, browser: Any, width: int) -> None:
    page, problems = opened(browser, brief.removesuffix("/v1") + "/", width)
    assert page.evaluate("document.activeElement.id") == "query"
    # By keyboard alone: type, go on past the examples to the number of alternatives, and back up to send.
    page.keyboard.type(ATTACK)
    for _ in range(6):
        page.keyboard.press("Tab")
    page.keyboard.type("2")
    page.locator("#query").press("Control+Enter")
    until(lambda: page.locator("#actions").is_visible())
    assert page.title() == "vpo_ray playground", "the query's script did not run"
    assert page.locator("main script, main img").count() == 0
    prompt = page.locator("#prompt").inner_text()
    assert prompt
    plain = "[...document.getElementById('prompt').childNodes].filter((n) => n.nodeType === 3)"
    assert not page.evaluate(f"{plain}.map((n) => n.data).join('')").strip(), "all of it is marked"
    assert page.locator("#original").inner_text() == ATTACK
    # Equal ones are told once. Arrows go from one to the next, and round.
    assert page.locator("#tabs button").count() in (2, 3)
    page.locator("#tab-0").press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-1"
    assert page.locator("#prompt-title").inner_text() == "Alternative 1"
    assert page.locator("#prompt").inner_text() != prompt
    page.keyboard.press("Home")
    assert page.locator("#prompt").inner_text() == prompt
    assert page.locator("#key").is_hidden()
    assert page.locator("#opinion").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert problems == []
    page.close()


@pytest.mark.ray
@pytest.mark.engine
def test_wishes_are_folded_out_and_sent(brief: str, browser: Any) -> None:
    page, problems = opened(browser, brief.removesuffix("/v1") + "/", 390)
    assert page.locator("[data-wish=keep]").is_hidden()
    page.locator("#wishes summary").click()
    page.locator("[data-wish=language]").select_option("th")
    page.locator("[data-wish=max_words]").fill("9")
    assert page.locator("#wished").inner_text() == "(2)"
    assert page.locator("#effort").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#query").fill("a cat")
    page.locator("#query").press("Control+Enter")
    until(lambda: page.locator("#actions").is_visible())
    assert "not met: language: th" in page.locator("#facts").inner_text()
    assert problems == []
    page.close()


@pytest.mark.ray
@pytest.mark.engine
def test_a_prompt_is_edited_and_sent_on_and_the_session_is_remembered(brief: str, browser: Any) -> None:
    page, problems = opened(browser, brief.removesuffix("/v1") + "/", 1280)
    page.locator("#examples button").first.click()
    until(lambda: page.locator("#actions").is_visible())
    first = page.locator("#prompt").inner_text()
    page.get_by_role("button", name="Edit and send on").click()
    assert page.evaluate("document.activeElement.id") == "edited"
    page.keyboard.type("A dog instead. ")
    sent = page.locator("#edited").input_value()
    assert sent.strip()
    assert sent != first
    page.get_by_role("button", name="Optimise it").click()
    history = page.locator("#history button")
    until(lambda: history.count() == 2)
    assert page.locator("#query").input_value() == sent
    assert history.nth(1).inner_text() == "a cat on a roof"
    history.nth(1).click()
    assert page.locator("#prompt").inner_text() == first
    assert page.locator("#query").input_value() == "a cat on a roof"
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.locator("#clear").click()
    assert page.locator("#answer").is_hidden()
    assert page.locator("#session").is_hidden()
    assert problems == []
    page.close()


@pytest.mark.ray
@pytest.mark.engine
def test_a_wrong_key_and_a_safety_outcome_are_readable(locked: tuple[str, str], browser: Any) -> None:
    where, key = locked
    page, problems = opened(browser, where, 390)
    page.locator("#query").fill("a knife on a table")
    page.get_by_label("API key").fill("vpo-wrong")
    page.get_by_role("button", name="Optimise").click()
    until(lambda: page.locator("#problem").is_visible())
    assert page.get_by_role("alert").inner_text() == "401: this API key is not known"
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Optimise").click()
    until(lambda: page.locator("#safety").inner_text() != "")
    assert "rewritten — query: keyword 'knife'" in page.locator("#safety").inner_text()
    assert page.locator("#problem").is_hidden()
    assert [p for p in problems if "401" not in p] == []
    page.close()


@pytest.mark.ray
@pytest.mark.engine
def test_the_page_is_served_with_a_strict_policy(brief: str) -> None:
    root = brief.removesuffix("/v1")
    for path in ("/", "/playground/page.js", "/playground/page.css"):
        assert httpx.get(root + path).headers["Content-Security-Policy"] == POLICY
    assert httpx.get(f"{root}/playground/..%2f__init__.py").status_code == 404


@pytest.mark.ray
@pytest.mark.engine
def test_what_is_said_on_the_page_is_kept(endpoint: Callable[..., str], browser: Any, tmp_path: Path) -> None:
    from ray import serve

    notice = "Kept for <b>90</b> days."
    feedback = {"store": str(tmp_path), "anyone": True, "notice": notice}
    where = endpoint("heard", feedback=feedback).removesuffix("/v1") + "/"
    page, problems = opened(browser, where, 390)
    assert page.locator("#notice").inner_text() == notice
    page.locator("#n").fill("2")
    page.locator("#query").fill("a red ball")
    page.get_by_role("button", name="Optimise", exact=True).click()
    until(lambda: page.locator("#opinion").is_visible())

    def said(button: str) -> None:
        page.locator(button).click()
        until(lambda: page.locator("#thanks").inner_text() == "Thank you.")
        page.evaluate("document.getElementById('thanks').textContent = ''")

    said("#up")
    page.locator("#comment").fill("gut — 好")
    said("#tell")
    page.locator("#tab-1").click()
    assert page.locator("#up").is_hidden(), "a thumb is about the prompt"
    said("#choose")
    page.locator("#edit").click()
    page.locator("#edited").fill("A red ball rolls.")
    said("#send")
    assert problems == []
    page.close()
    serve.delete("heard")
    rows = list(FeedbackTables(str(tmp_path)).opinions.rows())
    found = [
        {name: row[name] for name in ("rating", "chosen", "edited", "comment") if row[name]} for row in rows
    ]
    wanted = [{"rating": "up"}, {"comment": "gut — 好"}, {"chosen": 1}, {"edited": "A red ball rolls."}]
    assert sorted(found, key=str) == sorted(wanted, key=str)
    assert len({row["answer_id"] for row in rows}) == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_the_videos_of_the_query_and_of_its_prompt_stand_side_by_side(
    endpoint: Callable[..., str], browser: Any, tiny_models: Path, tiny_sets: list[str], tmp_path: Path
) -> None:
    recipe = load(TINY, [part for part in tiny_sets if part != "--set"])
    videos = {"store": str(tmp_path), "render": recipe.render}
    where = endpoint("beside", videos=videos).removesuffix("/v1") + "/"
    page, problems = opened(browser, where, 1280)
    page.locator("#examples button").first.click()
    until(lambda: page.locator("#actions").is_visible())
    page.locator("#film").click()
    until(lambda: page.locator("#film").is_enabled(), 150)
    assert page.locator("#problem").is_hidden()
    raw, film = page.locator("#raw-video"), page.locator("#film-video")
    until(lambda: raw.evaluate("v => v.readyState") > 1 and film.evaluate("v => v.readyState") > 1)
    assert raw.evaluate("v => v.src") != film.evaluate("v => v.src")
    boxes = raw.bounding_box(), film.bounding_box()
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    raw.evaluate("v => v.play()")
    until(lambda: not film.evaluate("v => v.paused"))
    assert problems == []
    page.close()
