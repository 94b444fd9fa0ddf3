"""A KV cache on a CPU takes a part of what is free, unless somebody says otherwise."""

import os
import subprocess
import sys

import pytest

from vpo_ray.engines.chat import cpu_memory
from vpo_ray.engines.chat.cpu_memory import VARIABLE, bound_cpu_memory, free_memory


def test_what_is_said_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for arguments in ({"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 2**30}):
        bound_cpu_memory(arguments)
        assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, "7")
    bound_cpu_memory({})
    assert os.environ[VARIABLE] == "7"


def test_a_container_with_less_counts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(cpu_memory, "_CGROUP", tmp_path / "none")
    machine = free_memory()
    assert machine > 2**20
    monkeypatch.setattr(cpu_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 2**20
    (tmp_path / "memory.max").write_text("150\n")
    assert free_memory() == 100


@pytest.mark.engine
def test_a_quarter_of_what_is_free_on_a_cpu() -> None:
    code = (
        "import os; from vpo_ray.engines.chat.cpu_memory import *; "
        "bound_cpu_memory({'gpu_memory_utilization': None}); "
        "print('gib', os.environ[VARIABLE], free_memory())"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200, check=True
    )
    _, gib, free = done.stdout.splitlines()[-1].split()
    assert 1 <= int(gib) <= max(1, int(free) * 0.3 / 2**30)
