"""The smallest recipe as a mapping."""

from typing import Any


def tree(**sections: Any) -> dict[str, Any]:
    """The smallest recipe, with sections replaced."""
    return {
        "name": "small",
        "out": "runs/small",
        "queries": {"path": "queries.txt"},
        "policy": {"model": "org/policy"},
        "sample": {"k": 2, "temperature": 1.0, "max_tokens": 16},
        "judge": {"model": "org/judge"},
        "render": {"model": "org/video"},
        "reward": {"model": "org/reward", "checklist": {"file": "checklist.yaml"}},
        **sections,
    }
