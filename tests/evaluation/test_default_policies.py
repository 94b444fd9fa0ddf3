"""What `vpo evaluate` compares where its recipe names no policies."""

from pathlib import Path

import pytest

from vpo_ray.evaluation.policies import default_policies, rivals
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import RecipeError, load
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


def test_an_llm_may_compare_with_one_of_them(tmp_path: Path) -> None:
    def against(name: str) -> str:
        asked = f"{{llm: {{model: some/judge}}, against: {name}}}"
        return f"evaluate={{prefer_prompts: {asked}}}"

    for name in ("query", "sft", "dpo", "dpo_3"):
        recipe = load(TINY, [against(name)])
        assert recipe.evaluate is not None
        assert recipe.evaluate.bases() == {"prefer_prompts": name}
    with pytest.raises(RecipeError, match=r"prefer_prompts\.against: no policy 'qury', but query, base, sft"):
        load(TINY, [against("qury")])
    # Which rounds there are, the run knows.
    with pytest.raises(LoopError, match=r"prefer_prompts\.against: no policy 'dpo_3', but query, sft, dpo$"):
        rivals(recipe, RunDir(tmp_path), recipe.evaluate, [])
