"""A KV cache on a CPU takes a part of what is free, unless somebody says otherwise."""

import os
import subprocess
import sys

import pytest

from vpo_ray.engines.chat import cpu_memory
from vpo_ray.engines.chat.cpu_memory import VARIABLE, cpu_cache, free_memory


def test_what_is_said_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for arguments in ({"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 2**30}):
        assert cpu_cache(arguments) == {}
    monkeypatch.setenv(VARIABLE, "7")
    assert cpu_cache({}) == {}


def test_a_container_with_less_counts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(cpu_memory, "_CGROUP", tmp_path / "none")
    machine = free_memory()
    assert machine > 2**20
    monkeypatch.setattr(cpu_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("50\n", "utf-8")
    (tmp_path / "memory.max").write_text("max\n", "utf-8")
    assert free_memory() > 2**20
    (tmp_path / "memory.max").write_text("150\n", "utf-8")
    assert free_memory() == 100


@pytest.mark.engine
def test_a_quarter_of_what_is_free_on_a_cpu() -> None:
    code = (
        "from vpo_ray.engines.chat.cpu_memory import *; "
        "print(cpu_cache({'gpu_memory_utilization': None})['kv_cache_memory_bytes'], free_memory())"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200, check=True
    )
    taken, free = map(int, done.stdout.splitlines()[-1].split())
    assert 2**30 <= taken <= max(2**30, free * 0.3)
