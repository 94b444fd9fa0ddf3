"""Context parallel: several GPUs of one node compute one video together, a process each.

The engine that a pool's replica holds is rank 0. It starts the other ranks, which load the same
pipeline and denoise what rank 0 denoises; diffusers splits the sequence between them and exchanges
heads in attention (Ulysses). What is rendered, in which batches, and when time is over is rank 0's
decision, and only rank 0 decodes the latents.

A rank that fails alone leaves the others waiting for it in a collective. Then the replica ends, as
it does for a lost device, and its rows go to a fresh one. Ranks end with their replica, however that
ends: each watches the pipe that its orders come through.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from vpo_ray.engines.video.weights import VideoModelError
from vpo_ray.recipe import Render

log = logging.getLogger(__name__)

LOAD_LIMIT_S = 1800.0  # a large model from a network disk
STRAGGLER_S = 60.0  # what one rank may need longer than another for the same batch

# Has a plan in diffusers 0.42 that fails: its mask is one of all heads, and a rank has its share of them.
_UNFIT = "LTXVideoTransformer3DModel"


class RankLostError(RuntimeError):
    """A rank failed where the others did not, so that they cannot go on together."""


class Order(NamedTuple):
    """A batch to denoise: its prompts, a seed for each, and arguments of the pipeline's call.

    `limit_s` is the time after which it is given up, None for none.
    """

    prompts: list[str]
    seeds: list[int]
    arguments: dict[str, Any]
    limit_s: float | None


Denoise = Callable[[Order], object]


class Ranks:
    """The other ranks, seen from rank 0. Made before rank 0 loads its pipeline, so that all load at once.

    Args:
        settings: the recipe's render section, with `context_parallel` above 1.
        load: what the other ranks call, in their own processes, to load the pipeline.
    """

    def __init__(self, settings: Render, load: Callable[[Render], Denoise]) -> None:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # 0: a free port
        context = get_context("spawn")
        self._pipes: list[Connection] = []
        for rank in range(1, settings.context_parallel):
            ours, theirs = context.Pipe()
            arguments = (rank, store.port, theirs, settings, load)
            context.Process(target=_rank, args=arguments, name=f"render-rank-{rank}", daemon=True).start()
            theirs.close()
            self._pipes.append(ours)
        _join(settings, 0, store)

    def wait_loaded(self) -> None:
        """Raises VideoModelError for a rank that could not load the pipeline."""
        end = time.monotonic() + LOAD_LIMIT_S
        for rank, pipe in enumerate(self._pipes, 1):
            said = (
                _receive(pipe) if pipe.poll(max(0, end - time.monotonic())) else "it takes too long to load"
            )
            if said is not None:
                raise VideoModelError(f"rank {rank} of render.context_parallel: {said}")

    @contextmanager
    def following(self, order: Order) -> Iterator[None]:
        """Let every rank denoise the order while the body does.

        Raises:
            RankLostError: a rank failed, or did not end, where the body did not.
        """
        for pipe in self._pipes:
            pipe.send(order)
        ended, reports = threading.Event(), dict[int, str | None]()
        watch = threading.Thread(target=self._watch, args=(ended, reports), daemon=True)
        watch.start()
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001  judged below, with what the others say
            failure = error
        finally:
            ended.set()
            watch.join()
        # Ranks that fail alike fail at the same point of the same program. Rank 0 may also fail
        # alone, after the last collective: it decodes what all have denoised.
        alike = failure is not None and set(reports.values()) == {reason(failure)}
        others_done = not any(reports.values())
        if len(reports) < len(self._pipes) or not (alike or others_done):
            raise RankLostError(f"rank 0: {failure and reason(failure)}; the others: {reports}") from failure
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """End the other ranks."""
        import torch.distributed as dist

        # First, while the others are there: gloo is not at its best when both sides leave at once.
        dist.destroy_process_group()
        for pipe in self._pipes:
            pipe.close()

    def _watch(self, ended: threading.Event, reports: dict[int, str | None]) -> None:
        """Collect what the ranks say of an order. When one fails and rank 0 waits for it for ever,
        end this process: nothing else gets it out of a collective."""
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes, 1)}
        limit = float("inf")
        while waiting and time.monotonic() < limit:
            for pipe in connection.wait(list(waiting), timeout=0.05 if ended.is_set() else 0.5):
                assert isinstance(pipe, Connection)
                reports[waiting.pop(pipe)] = _receive(pipe)
            if ended.is_set() or any(reports.values()):
                limit = min(limit, time.monotonic() + STRAGGLER_S)
        if any(reports.values()) and not ended.wait(STRAGGLER_S):
            log.critical("this replica ends, ranks of render.context_parallel failed: %s", reports)
            os._exit(1)


def rank_device(device: str) -> str:
    """This rank's device. Raises VideoModelError when there are fewer GPUs than ranks."""
    import torch
    import torch.distributed as dist

    if device == "cpu":
        return device
    if torch.cuda.device_count() < dist.get_world_size():
        raise VideoModelError(
            f"render.context_parallel={dist.get_world_size()}: this replica sees "
            f"{torch.cuda.device_count()} GPUs (render.pool.num_gpus)"
        )
    torch.cuda.set_device(dist.get_rank())
    return f"cuda:{dist.get_rank()}"


def split_sequence(model: Any, ranks: int, tokens: list[int]) -> None:
    """Let `ranks` ranks share the sequence of this network.

    Args:
        tokens: lengths of the sequences that are split.

    Raises:
        VideoModelError: diffusers does not know how to split this model or its attention, or there
            are heads or tokens that so many ranks cannot share evenly.
    """
    import diffusers
    import torch

    where = f"render.context_parallel: {type(model).__name__}"
    if getattr(model, "_cp_plan", None) is None or type(model).__name__ == _UNFIT:
        raise VideoModelError(f"{where} cannot be split by diffusers {diffusers.__version__} (Wan can)")
    parts = {"heads": [model.config.num_attention_heads], "tokens": tokens}
    for what, numbers in parts.items():
        if uneven := [n for n in numbers if n % ranks]:
            raise VideoModelError(f"{where} has {uneven[0]} {what}, which {ranks} GPUs cannot share evenly")
    config = diffusers.ContextParallelConfig(ulysses_degree=ranks)
    if not torch.accelerator.is_available():
        # diffusers makes its mesh of accelerators only, and fails where there is none.
        model._resolve_parallel_config = partial(_resolved_on_cpu, model)
    try:
        model.enable_parallelism(config=config)
    except ValueError as error:
        raise VideoModelError(f"{where}: {error}") from error


def _resolved_on_cpu(model: Any, config: Any) -> Any:
    import torch
    import torch.distributed as dist
    from diffusers import ParallelConfig

    mesh = dist.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    resolved = ParallelConfig(context_parallel_config=config)
    resolved.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    model._parallel_config = resolved
    return resolved


def decided(yes: bool) -> bool:
    """What rank 0 says, on every rank."""
    import torch
    import torch.distributed as dist

    answer = torch.tensor(int(yes))
    dist.broadcast(answer, 0)
    return bool(answer)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _join(settings: Render, rank: int, store: Any) -> None:
    import torch
    import torch.distributed as dist

    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=settings.context_parallel)


def _rank(
    rank: int, port: int, pipe: Connection, settings: Render, load: Callable[[Render], Denoise]
) -> None:
    """The life of another rank's process."""
    import torch
    import torch.distributed as dist

    orders: SimpleQueue[Order] = SimpleQueue()
    threading.Thread(target=_take_orders, args=(pipe, orders), daemon=True).start()
    try:
        _join(settings, rank, dist.TCPStore("127.0.0.1", port, is_master=False))
        denoise = load(settings)
    except Exception as error:  # noqa: BLE001  rank 0 reports it
        pipe.send(reason(error))
        return
    pipe.send(None)
    while True:
        order = orders.get()
        try:
            denoise(order)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # only then have its collectives come to an end
        except Exception as error:  # noqa: BLE001  rank 0 reports it
            pipe.send(reason(error))
        else:
            pipe.send(None)


def _take_orders(pipe: Connection, orders: SimpleQueue[Order]) -> None:
    try:
        while True:
            orders.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)  # rank 0 is gone, and the main thread may wait for it in a collective


def _receive(pipe: Connection) -> str | None:
    try:
        said: str | None = pipe.recv()
    except (EOFError, OSError):
        return "its process died"
    return said
