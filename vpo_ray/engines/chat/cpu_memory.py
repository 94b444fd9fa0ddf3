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


def cpu_cache(arguments: Mapping[str, Any]) -> dict[str, int]:
    """What to add to an engine's arguments: on a CPU, a KV cache of a quarter of the memory that is free, and
    of 1 GiB at least. Nothing where the arguments or the environment say how much, and on a GPU."""
    if os.environ.get(VARIABLE) or any(arguments.get(name) is not None for name in _CHOICES):
        return {}
    from vllm.platforms import current_platform

    return {"kv_cache_memory_bytes": max(_GIB, free_memory() // 4)} if current_platform.is_cpu() else {}


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container where that has fewer."""
    lines = Path("/proc/meminfo").read_text("ascii", "replace").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        most = int((_CGROUP / "memory.max").read_text())
        return min(free, max(0, most - int((_CGROUP / "memory.current").read_text())))
    except (OSError, ValueError):  # no such container, or no limit ("max")
        return free
