"""How much memory vLLM's KV cache takes on a CPU, where nobody says.

vLLM would take 92 % of the machine's memory, and does not start where less is free: on a laptop with a
browser open, or beside another engine of the same stream.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # GiB, a whole number
_GIB = 2**30
_CHOICES = ("gpu_memory_utilization", "kv_cache_memory_bytes")
_CGROUP = Path("/sys/fs/cgroup")


def bound_cpu_memory(arguments: Mapping[str, Any]) -> None:
    """Before an engine is made: on a CPU, give its KV cache a quarter of the memory that is free, and 1 GiB
    at least. What `arguments` of the engine or the environment say goes before that; a GPU is left alone.
    """
    if os.environ.get(VARIABLE) or any(arguments.get(name) is not None for name in _CHOICES):
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ[VARIABLE] = str(max(1, free_memory() // 4 // _GIB))


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container where that has fewer."""
    lines = Path("/proc/meminfo").read_text("ascii", "replace").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        most = int((_CGROUP / "memory.max").read_text())
        return min(free, max(0, most - int((_CGROUP / "memory.current").read_text())))
    except (OSError, ValueError):  # no such container, or no limit ("max")
        return free
