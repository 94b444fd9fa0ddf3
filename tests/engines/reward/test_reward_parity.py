import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def report(golden: Path) -> dict[str, Any]:
    """What benchmarks/parity.py finds on the golden folder."""
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity", path)
    assert spec is not None
    assert spec.loader is not None
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    return parity.compare(golden)


def test_frames_ids_positions_and_rotation_are_exact(report: dict[str, Any]) -> None:
    exact = report["exact"]
    for name in ("sampled_frames", "frames", "input_ids", "position_ids", "token_type_ids", "rope_bfloat16"):
        equal, total = exact[name].split("/")
        assert equal == total != "0", name
    assert exact["decoded_sha256"] == "6/6"


def test_float32_differs_by_rounding_only(report: dict[str, Any]) -> None:
    assert report["max_abs"]["pixel_values"] < 1e-5
    assert report["max_abs"]["features_float32"] < 1e-4
    for template, answers in report["answers"]["float32"].items():
        assert report["max_abs"][f"logits_float32/{template}"] < 1e-4
        assert answers["equal"] == answers["total"] == 24
    assert report["exact"]["first_token_float32"] == "48/48"


def test_bfloat16_keeps_every_answer_that_is_not_a_close_call(report: dict[str, Any]) -> None:
    for template, answers in report["answers"]["bfloat16"].items():
        assert report["max_abs"][f"logits_bfloat16/{template}"] < 0.3
        assert report["mean_abs"][f"logits_bfloat16/{template}"] < 0.01
        equal, total = answers["margin>=0.5"].split("/")
        assert equal == total
