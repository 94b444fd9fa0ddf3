"""What a run puts on a hub: the policy with its evaluation, the data with its card, and nothing else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer

from vpo_ray.cli import main
from vpo_ray.records import query_id
from vpo_ray.storage.run_dir import RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
FACTS = {
    "phase": "dpo", "job": "j", "fingerprint": "f", "base_model": "/home/somebody/runs/x/checkpoints/sft",
    "rows": 6, "held_out": 0, "steps": 3, "exported_step": 3, "dropped": {}, "warnings": [], "lora": None,
    "license": "other", "metrics": {"loss": 0.5}, "resumed_after": None,
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.close()


@pytest.fixture
def words(tmp_path: Path, tiny_models: Path) -> list[str]:
    """`--out` and what the recipe is to say, with a run directory behind it."""
    run = RunDir(str(tmp_path / "run"))
    sets = [f"policy.model={tiny_models / 'policy'}", f"render.model={tiny_models / 'video'}"]
    checkpoint = tmp_path / "run/checkpoints/dpo"
    shutil.copytree(tiny_models / "policy", checkpoint)
    (checkpoint / "vpo.json").write_text(json.dumps(FACTS), "utf-8")
    (checkpoint / "README.md").write_text("trained from /home/somebody", "utf-8")
    (tmp_path / "run/recipe.yaml").write_text("name: tiny\n", "utf-8")
    cats, dogs = query_id("cats"), query_id("dogs")
    query = {"split": "dpo", "source": "/home/somebody/log.jsonl", "flags": None}
    run.table("queries").append(
        [
            {"query_id": cats, "query": "cats", "unsafe": True, **query},
            {"query_id": dogs, "query": "dogs", "unsafe": False, **query},
        ]
    )
    run.table("sft").append([{"query_id": cats, "query": "cats", "prompt": "Two grey cats."}])
    pair = {
        "query_id": dogs,
        "query": "dogs",
        "chosen": "A dog.",
        "rejected": "dog",
        "chosen_id": "a",
        "rejected_id": "b",
    }
    run.table("pairs").append([{**pair, "pair_id": "1", "kind": "video", "margin": 0.7}])
    agreement = [
        {"a": "reward", "b": "motion|<b>", "mean": -0.25},
        {"a": "reward", "b": "none", "mean": None},
    ]
    (tmp_path / "run/ledger.json").write_text(
        json.dumps({"stages": {"score": {"agreement": agreement}}}), "utf-8"
    )
    for name, date in (("old", "2026-01-01"), ("new", "2026-02-01")):
        (tmp_path / f"run/evaluation/{name}").mkdir(parents=True)
        (tmp_path / f"run/evaluation/{name}/results.json").write_text(
            json.dumps({"id": name, "date": date}), "utf-8"
        )
        (tmp_path / f"run/evaluation/{name}/report.html").write_text(name, "utf-8")
    (tmp_path / "run/evaluation.json").write_text(
        json.dumps({"results": "evaluation/new/results.json"}), "utf-8"
    )
    return ["push", TINY, "--out", str(tmp_path / "run"), *(word for s in sets for word in ("--set", s))]


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_policy_goes_with_its_evaluation_and_without_paths(
    hub: HubServer, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*words, "--policy", "team/optimiser"]) == 0
    assert f"{hub.url}/team/optimiser" in capsys.readouterr().out
    made = hub.made["team/optimiser"]
    assert made.get("private") is True or made.get("visibility") == "private"
    files = hub.pushed["team/optimiser"]
    weights = tmp_path / "run/checkpoints/dpo/model.safetensors"
    assert files["model.safetensors"] == weights.read_bytes()
    assert files["evaluation/report.html"] == b"new"
    assert files["recipe.yaml"] == b"name: tiny\n"
    card = files["README.md"].decode()
    assert "evaluation/report.html" in card
    assert "base_model" not in header(card), "a path is no id of the hub"
    assert "somebody" not in card + files["vpo.json"].decode()
    assert not any(name.startswith((".cache", "checkpoints")) for name in files)


def test_the_policy_of_the_last_round_goes(hub: HubServer, words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (2, 3):
        (run / f"rounds/{number}").mkdir(parents=True)
        (run / f"rounds/{number}/round.json").write_text("{}", "utf-8")
    shutil.copytree(run / "checkpoints/dpo", run / "rounds/2/checkpoints/dpo")
    (run / "rounds/2/checkpoints/dpo/vpo.json").write_text(json.dumps({**FACTS, "steps": 77}), "utf-8")
    assert main([*words, "--policy", "team/optimiser"]) == 0
    assert json.loads(hub.pushed["team/optimiser"]["vpo.json"])["steps"] == 77, "the third trains still"


def test_data_goes_with_a_card(hub: HubServer, words: list[str]) -> None:
    assert main([*words, "--data", "team/pairs", "--public", "--license", "cc-by-4.0"]) == 0
    made = hub.made["datasets/team/pairs"]
    assert made.get("private") is False or made.get("visibility") == "public"
    files = hub.pushed["datasets/team/pairs"]
    assert json.loads(files["preference.jsonl"])["rejected"] == [{"role": "assistant", "content": "dog"}]
    card = files["README.md"].decode()
    assert header(card)["license"] == "cc-by-4.0"
    assert [one["data_files"] for one in header(card)["configs"]] == ["sft.jsonl", "preference.jsonl"]
    for line in ("| pairs by video | 1 |", "| labelled as unsafe | 1 |", "| queries from `log.jsonl` | 2 |"):
        assert line in card
    assert "| rank correlation of `reward` and `motion??b?` | -0.25 |" in card
    assert "somebody" not in card


def test_what_cannot_be_pushed_is_told(
    hub: HubServer,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert main(words) == 2
    assert "--policy OWNER/NAME" in capsys.readouterr().err
    (tmp_path / "run/checkpoints/dpo/vpo.json").unlink()
    assert main([*words, "--policy", "team/optimiser"]) == 2
    assert "is not a trained policy" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main([*words, "--data", "team/pairs"]) != 0
    said = capsys.readouterr().err
    assert "HF_TOKEN" in said
    assert "hf_wrong" not in said
    assert hub.pushed == {}
