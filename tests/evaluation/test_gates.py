"""Limits of an evaluation: for CI, against an earlier evaluation, and before a checkpoint is deployed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_samples import context, sample

from vpo_ray import cli
from vpo_ray.evaluation.figures import results_of
from vpo_ray.evaluation.gates import (
    GateError,
    LimitError,
    below,
    must_pass,
    read_results,
    require_evaluation,
    worse,
)
from vpo_ray.recipe import Evaluation, RecipeError, load_serve
from vpo_ray.recipe.serve import Require
from vpo_ray.records import content_id

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
QUERIES = [f"query {n}" for n in range(50)]


def evaluated(aligned: int = 45, score: float = 0.5, **more: Any) -> dict[str, Any]:
    """An evaluation of sft, then dpo, whose share of aligned prompts and mean reward are given."""
    rows = []
    for number, query in enumerate(QUERIES):
        rows.append(sample("sft", query, {"reward": 0.4}))
        verdict = "aligned" if number < aligned else "unsafe"
        wave = 0.1 if number % 2 else -0.1
        measures = {"reward": score + wave, "prompt.words": 30.0}
        rows.append(sample("dpo", query, measures, verdict=verdict))
    return results_of(rows, [], Evaluation(resamples=1000), context("sft", "dpo", **more))


def test_a_limit_is_of_the_last_policy_in_every_set() -> None:
    assert below(evaluated(), ["alignment.aligned=0.9", "verdict.unsafe=0.1", "reward=0.45"]) == []
    assert below(evaluated(), ["alignment.aligned=0.93"]) == [
        "eval, render: verdict.aligned of dpo is 0.9 (95% interval 0.7864 to 0.9565), below 0.93"
    ]
    (reason,) = below(evaluated(), ["verdict.unsafe=0.05"])
    assert "verdict.unsafe of dpo is 0.1" in reason
    assert reason.endswith("above 0.05")


def test_a_limit_names_a_policy() -> None:
    assert below(evaluated(), ["eval/sft/verdict.aligned=1"]) == []
    assert below(evaluated(), ["eval/sft/reward=0.41"]) == ["eval, render: reward of sft is 0.4, below 0.41"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("verdict.aligned", "is no limit"),
        ("verdict.aligned=much", "is no limit"),
        ("verdict.aligned=nan", "is no limit"),
        ("sft/verdict.aligned=1", "is no limit"),
        ("alignment=0.9", "dpo has no alignment in any set. There are the policies sft, dpo"),
        ("other/dpo/reward=0.9", "dpo has no reward in other"),
        ("prompt.words=9", "neither better high nor low"),
    ],
)
def test_a_limit_that_cannot_be_checked_is_refused(limit: str, message: str) -> None:
    with pytest.raises(LimitError, match=message):
        below(evaluated(), [limit])


def test_the_figures_of_an_earlier_evaluation() -> None:
    earlier = evaluated(45, 0.5)
    assert worse(evaluated(44, 0.49), earlier, 0.02) == []
    assert worse(evaluated(50, 0.9), earlier, 0.02) == []
    reasons = worse(evaluated(42, 0.4), earlier, 0.02)
    assert [reason.split(" (")[0] for reason in reasons] == [
        "eval, render: reward of dpo is 0.4",
        "eval, render: verdict.aligned of dpo is 0.84",
        "eval, render: verdict.unsafe of dpo is 0.16",
    ]
    assert reasons[0].endswith("and was 0.5 on 2026-11-28: worse by more than 0.02")
    with pytest.raises(LimitError, match="the set eval has other queries"):
        worse(evaluated(sets={"eval": {"hash": "another"}}), earlier, 0.02)
    alone = earlier | {"results": {"other": earlier["results"]["eval"]}}
    with pytest.raises(LimitError, match="no set, policy and metric in common"):
        worse(evaluated(), alone, 0.02)


def test_what_does_not_pass_has_an_exit_status_of_its_own() -> None:
    must_pass([])
    with pytest.raises(GateError, match="the evaluation does not pass:\n  one\n  two") as caught:
        must_pass(["one", "two"])
    assert caught.value.exit_status == 4


def test_a_file_that_is_no_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="No such file"):
        read_results(str(tmp_path / "results.json"))
    (tmp_path / "results.json").write_text("{", "utf-8")
    with pytest.raises(LimitError, match="is not JSON"):
        read_results(str(tmp_path / "results.json"))
    (tmp_path / "results.json").write_text("{}", "utf-8")
    with pytest.raises(LimitError, match=r"is not the results\.json of an evaluation"):
        read_results(str(tmp_path / "results.json"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}", "utf-8")
    (folder / "vpo.json").write_text(json.dumps({"phase": "dpo", "fingerprint": "id of dpo"}), "utf-8")
    return str(folder)


def stored(tmp_path: Path, results: dict[str, Any]) -> str:
    (tmp_path / "results.json").write_text(json.dumps(results), "utf-8")
    return str(tmp_path / "results.json")


def test_a_checkpoint_needs_the_evaluation_that_it_passed(checkpoint: str, tmp_path: Path) -> None:
    place = stored(tmp_path, evaluated())
    require_evaluation(checkpoint, None)
    require_evaluation(checkpoint, Require(results=place, fail_below=["verdict.aligned=0.9"]))
    with pytest.raises(GateError, match=r"verdict\.aligned of dpo is 0\.9"):
        require_evaluation(checkpoint, Require(results=place, fail_below=["verdict.aligned=0.95"]))
    Path(checkpoint, "vpo.json").write_text(json.dumps({"fingerprint": "id of another"}), "utf-8")
    with pytest.raises(GateError, match=r"evaluates other checkpoints .* has its identity"):
        require_evaluation(checkpoint, Require(results=place, fail_below=["verdict.aligned=0.9"]))


def test_limits_are_of_the_policy_that_is_deployed(checkpoint: str, tmp_path: Path) -> None:
    """Not of the last one of the evaluation."""
    Path(checkpoint, "vpo.json").write_text(json.dumps({"fingerprint": "id of sft"}), "utf-8")
    place = stored(tmp_path, evaluated(10))
    require_evaluation(checkpoint, Require(results=place, fail_below=["verdict.aligned=0.95"]))


def test_a_checkpoint_of_another_trainer_is_known_by_its_files(checkpoint: str, tmp_path: Path) -> None:
    from vpo_ray.train.model_files import identity

    Path(checkpoint, "vpo.json").unlink()
    weights = Path(checkpoint, "model.safetensors")
    weights.write_bytes(bytes(range(256)) * 9000)
    results = evaluated()
    results["policies"]["dpo"]["identity"] = content_id("checkpoint", identity(checkpoint, None), digits=16)
    required = Require(results=stored(tmp_path, results), fail_below=["verdict.aligned=0.9"])
    require_evaluation(shutil.copytree(checkpoint, str(tmp_path / "copy")), required)
    weights.write_bytes(weights.read_bytes()[::-1])  # a later training wrote them
    with pytest.raises(GateError, match="evaluates other checkpoints"):
        require_evaluation(checkpoint, required)


def test_deploying_and_writing_a_config_refuse_before_anything_starts(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    required = {"results": stored(tmp_path, evaluated()), "fail_below": ["alignment.aligned=0.95"]}
    setting = f"serve.require={json.dumps(required)}"
    for command in (
        ["deploy", TINY, "--checkpoint", checkpoint, "--set", setting],
        ["serve", checkpoint, "--config", "--set", setting],
    ):
        assert cli.main(command) == 4
        assert "verdict.aligned of dpo is 0.9" in capsys.readouterr().err
    required["fail_below"] = ["alignment.aligned=0.9"]
    assert cli.main(["serve", checkpoint, "--config", "--set", f"serve.require={json.dumps(required)}"]) == 0


def test_a_recipe_s_limits_have_their_form() -> None:
    with pytest.raises(RecipeError, match=r"serve.require.fail_below.0: 'aligned' is no limit"):
        load_serve(None, ["serve.require={results: r.json, fail_below: [aligned]}"])
    with pytest.raises(RecipeError, match=r"fail_below"):
        load_serve(None, ["serve.require={results: r.json, fail_below: []}"])


def test_a_limit_without_its_form_is_told_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["evaluate", TINY, "--out", str(tmp_path / "run"), "--fail-below", "verdict.aligned>0.9"]
    assert cli.main(wrong) == 2
    assert "'verdict.aligned>0.9' is no limit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
