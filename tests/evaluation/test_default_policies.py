"""What `vpo evaluate` compares where its recipe names no policies."""

from pathlib import Path

import pytest

from vpo_ray.evaluation.policies import default_policies
from vpo_ray.recipe import load
from vpo_ray.storage.run_dir import ROUND, RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")


@pytest.mark.parametrize(("trained", "last"), [((), None), ((2,), 2), ((2, 3), 3)])
def test_the_policy_of_the_last_round_is_among_them(
    tmp_path: Path, trained: tuple[int, ...], last: int | None
) -> None:
    run = RunDir(tmp_path)
    for number in (2, 3):
        run.write_json(f"rounds/{number}/{ROUND}", {"round": number})
    for number in trained:
        run.write_json(f"rounds/{number}/checkpoints/dpo/vpo.json", {})
    found = default_policies(load(TINY), run)
    assert list(found) == ["query", "sft", "dpo", *([f"dpo_{last}"] if last else [])]
    assert [policy.round for policy in found.values() if policy.round] == ([last] if last else [])
