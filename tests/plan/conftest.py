"""Fixtures of the tests of plans."""

from pathlib import Path
from typing import Any

import pytest
from plan_recipes import ROOT


@pytest.fixture
def tiny(tiny_models: Path, tmp_path: Path) -> dict[str, Any]:
    """Overrides that make tiny.yaml usable from any folder."""
    queries = tmp_path / "queries.txt"
    queries.write_text(
        "\n".join(f"query number {number}" for number in range(100)) + "\n\nquery number 1\n", "utf-8"
    )
    return {
        "out": tmp_path / "run",
        "queries.path": queries,
        "queries.splits": "{dpo: 1}",
        "policy.model": tiny_models / "policy",
        "judge.model": tiny_models / "judge",
        "render.model": tiny_models / "video",
        "reward.model": tiny_models / "reward",
        "reward.checklist.file": tiny_models / "reward/checklist.yaml",
        "sft.data": ROOT / "vpo_ray/data/sft.jsonl",
    }
