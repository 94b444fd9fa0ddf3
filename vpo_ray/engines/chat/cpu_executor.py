"""vLLM's executor for a CPU whose cores the engine shares with those who bring it requests."""

import os

from vllm.v1.executor.uniproc_executor import UniProcExecutor

# Steps of niceness: a process at 10 gets a tenth of the time of one at 0 while both want a core.
GIVES_WAY = 10


class CpuExecutor(UniProcExecutor):
    """The model in the engine's own process, which gives way to others of the machine: a proxy needs
    a millisecond, and would wait for as long as a step of the engine takes."""

    def _init_executor(self) -> None:
        os.nice(GIVES_WAY)  # threads that compute are started later and inherit it
        super()._init_executor()
