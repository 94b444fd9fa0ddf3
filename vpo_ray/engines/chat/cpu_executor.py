"""vLLM's executor for a CPU that the engine shares with the processes that send it requests."""

import os

from vllm.v1.executor.uniproc_executor import UniProcExecutor

# At niceness 10 a process gets a tenth of the time of one at 0 while both want a core.
GIVES_WAY = 10


class CpuExecutor(UniProcExecutor):
    """The model in the engine's own process, at a lower priority: a proxy needs only a millisecond, and would
    otherwise wait for a whole step of the engine."""

    def _init_executor(self) -> None:
        os.nice(GIVES_WAY)  # compute threads start later and inherit it
        super()._init_executor()
