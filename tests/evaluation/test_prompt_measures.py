"""What is counted of a prompt, and what a guard model says of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion

from vpo_ray.evaluation.prompt_measures import guard, prompt_measures
from vpo_ray.evaluation.samples import SAMPLE
from vpo_ray.keywords import KeywordList
from vpo_ray.loop.ledger import reconcile
from vpo_ray.recipe import load
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.spending import endpoint_cost

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]


@pytest.mark.parametrize(("prompt", "words"), [("A cat sits, still.", 4), ("一只猫 sits", 4), ("", 0)])
def test_words_are_counted_as_curation_counts_them(prompt: str, words: int) -> None:
    found = prompt_measures("a cat", prompt)
    assert (found["prompt.words"], found["prompt.characters"]) == (words, len(prompt))


@pytest.mark.parametrize(
    ("query", "prompt", "kept"),
    [
        ("a dog runs on the beach", "A golden retriever leaps through the surf at sunset.", 1.0),
        ("eine Katze läuft über die Straße", "A grey cat walks slowly over a wet street.", 0.0),
        ("cat", "A grey cat walks slowly over a wet street.", None),
        ("a dog runs on the beach", "dog", None),
    ],
)
def test_the_language_is_kept_where_it_can_be_told(query: str, prompt: str, kept: float | None) -> None:
    assert prompt_measures(query, prompt)["prompt.language_kept"] == kept


@pytest.mark.parametrize(
    ("query", "prompt", "kept"),
    [
        ("a red car and a BLUE bus", "A blue bus passes a red  car.", 1.0),
        ("a red car and a blue bus", "A red car passes.", 0.0),
        ("a red dog", "A dog with a red car.", 1.0),  # the list's longer term is in the prompt
        ("a green car", "A green car.", None),
        ("a cat on a mat", "A catalogue.", None),
    ],
)
def test_required_words_are_all_kept(query: str, prompt: str, kept: float | None) -> None:
    required = KeywordList(["red car", "blue", "red"])
    assert prompt_measures(query, prompt, required=required)["prompt.required_kept"] == kept


def test_unsafe_words_are_found_however_they_are_written() -> None:
    unsafe = KeywordList(["gore"])
    for text, found in {"Ｇore!": 1.0, "gored": 0.0}.items():
        assert prompt_measures("a cat", text, None, unsafe)["prompt.unsafe_words"] == found
    assert not {"prompt.unsafe_words", "prompt.required_kept"} & prompt_measures("a cat", "gore").keys()


def sample(prompt: str | None) -> Row:
    return {**dict.fromkeys(SAMPLE.names), "prompt": prompt}


@pytest.mark.ray
def test_the_guard_is_asked_once_about_every_prompt(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    def label(request: Request) -> Reply:
        text = request["messages"][0]["content"].partition("<text>")[2]
        if "babble" in text:
            return completion("Well, it depends.")
        return completion({"reason": "so", "unsafe": "blood" in text})

    server = serve_endpoint(label)
    endpoint = {"base_url": server.url, "api_key_env": None, "retries": 0, "prompt_price": 1.0}
    llm = {"model": "g", "backend": "openai", "endpoint": endpoint, "pool": {"size": 1, "num_cpus": 0.1}}
    recipe = load(TINY, [f"out={tmp_path / 'run'}", f"evaluate={json.dumps({'guard': llm})}"])
    run = RunDir(recipe.out)
    samples = [sample(text) for text in ("A cat.", "A cat.", "blood", None, "babble")]
    for _ in range(2):
        assert guard(recipe, run, samples) == {"A cat.": False, "blood": True}
    assert len(server.requests) == 2 + 2, "each once, and a repair round for the one that babbles"
    (folder,) = [name for name in (tmp_path / "run/evaluation").iterdir() if (name / "ledger.json").exists()]
    ledger = json.loads((folder / "ledger.json").read_text("utf-8"))
    assert reconcile(ledger) == []
    assert ledger["stages"]["label"]["verdicts"] == {"safe": 1, "unsafe": 1}
    assert endpoint_cost(RunDir(str(folder))) == pytest.approx(4 / 1000)
