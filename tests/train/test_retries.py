"""What a phase does when Ray Train gives up."""

from collections.abc import Callable

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train import ControllerError, WorkerGroupError

from vpo_ray.train.examples import TrainError
from vpo_ray.train.job import retried

NODE_WENT = ControllerError(ActorUnavailableError("socket closed", b"0" * 16))
WORKERS_FAILED = WorkerGroupError("out of memory", {0: MemoryError()})


def failing(*errors: Exception) -> Callable[[], str]:
    """Raises the errors one after the other, and gives a result then."""
    left = list(errors)

    def fit() -> str:
        if left:
            raise left.pop(0)
        return "trained"

    return fit


def test_a_node_that_goes_while_workers_start_costs_a_try() -> None:
    assert retried(failing(NODE_WENT, NODE_WENT), "dpo", retries=2) == "trained"


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ([NODE_WENT] * 3, "dpo failed: .*socket closed"),
        ([ControllerError(ValueError("a bug"))], "dpo failed: .*a bug"),
        # Ray Train has tried these again itself.
        ([WORKERS_FAILED], "dpo failed 3 times: .*out of memory"),
    ],
)
def test_other_failures_are_told(errors: list[Exception], message: str) -> None:
    with pytest.raises(TrainError, match=f"(?s){message}"):
        retried(failing(*errors), "dpo", retries=2)
