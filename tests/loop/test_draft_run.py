"""Drafts and candidates by real vLLM engines on tiny weights, whole and with a LoRA adapter."""

from pathlib import Path
from typing import Any

import pytest

from vpo_ray.engines.chat.adapter import AdapterError, adapter_of
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.loop import phases
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.prompts.policy_prompt import prompt_ids
from vpo_ray.recipe import load
from vpo_ray.records import VERDICTS, query_id
from vpo_ray.stages.chains import Models
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.pipeline import generate

pytestmark = [pytest.mark.engine, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
TINY, SFT = str(ROOT / "jobs/recipes/tiny.yaml"), ROOT / "vpo_ray/data/sft.jsonl"


def run_of(folder: Path, split: str, *queries: str) -> RunDir:
    run = RunDir(folder / "run")
    rows = [{"query_id": query_id(q), "query": q, "source": "t", "split": split} for q in queries]
    run.table("queries").append(rows)
    return run


@pytest.mark.slow
def test_drafts_of_a_vllm_engine(
    tmp_path: Path, tiny_models: Path, tiny_sets: list[str], ray_cluster: None
) -> None:
    drafts = f"draft={{examples: {SFT}, temperature: 2.0, max_tokens: 400}}"
    sets = [*tiny_sets[1::2], f"out={tmp_path / 'run'}", drafts, "sft.data=null", "judge.max_tokens=400"]
    recipe = load(TINY, sets)
    # The third does not fit the engine's context: it must not reach the engine, which it would kill.
    run = run_of(tmp_path, "sft", "a cat", "a dog on the beach", "word " * 3000, *map(str, range(9)))
    phases.draft_sft(recipe, run)
    rows = {row["query"]: row for row in run.table("drafts").rows()}
    assert len(rows) == 12
    long = next(row for query, row in rows.items() if query.startswith("word "))
    assert long["error"].startswith("ChatError: ")
    assert "engine.max_model_len" in long["error"]
    good = [row for row in rows.values() if row["error"] is None]
    assert len(good) >= 8, [row["error"] for row in rows.values()]
    for row in good:
        assert row["verdict"] in VERDICTS
        assert len(row["examples"]) == 3
        assert (row["target"] is None) == (row["fault"] is not None)
        assert row["usage"]["draft"]["completion"] > 0
        assert len(row["missing"] or []) <= 2
    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    assert ledger["stages"]["draft"]["tokens"]["prompt"] > 0


@pytest.mark.slow
def test_a_policy_that_is_an_adapter(tmp_path: Path, adapted: tuple[Path, Any], ray_cluster: None) -> None:
    """What vLLM samples with the adapter is what transformers and peft give."""
    import torch

    folder, model = adapted
    tokenizer = load_tokenizer(str(folder))
    recipe = load(
        TINY,
        [f"out={tmp_path / 'run'}", "sft=null", "sample.k=1", "sample.temperature=0", "sample.max_tokens=12"],
    )
    queries = ["a cat", "the sea at night"]
    run = run_of(tmp_path, "dpo", *queries)
    generate(recipe, run, Models(str(folder), "adapted"), ("sample",))
    sampled = {row["query"]: row["prompt"] for row in run.table("candidates").rows()}

    def greedy(query: str) -> str:
        ids = torch.tensor([prompt_ids(tokenizer, query)])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=12, do_sample=False, temperature=None, top_p=None)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()

    assert sampled == {query: greedy(query) for query in queries}
    with model.disable_adapter():
        assert all(sampled[query] != greedy(query) for query in queries), "the adapter changes the text"


def test_what_is_an_adapter(tmp_path: Path, tiny_models: Path) -> None:
    assert adapter_of(str(tiny_models / "policy")) is None
    assert adapter_of("org/model") is None
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model", "r": 9}', "utf-8")
    found = adapter_of(str(tmp_path))
    assert found is not None
    assert (found.base, found.engine_kwargs()["max_lora_rank"]) == ("org/model", 16)
    (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(AdapterError, match="adapter_config"):
        adapter_of(str(tmp_path))
