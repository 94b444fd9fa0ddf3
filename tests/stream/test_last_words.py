"""What a process that died said last is kept, without secrets, and recognised where it has a known cause."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpo_ray.stream.last_words import advice, errors_in, with_causes, without_secrets

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
            "the GPU's memory is full",
        ),
        ("ValueError: No available memory for the cache blocks.", "the GPU's memory is full"),
        ("ImportError: libcuda.so.1: cannot open shared object file: No such file", "no driver for its GPU"),
        ("RuntimeError: Found no NVIDIA driver on your system", "no driver for its GPU"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", "/dev/shm is full"),
        ("Fatal Python error: Bus error", "/dev/shm is full"),
        ("OSError: You are trying to access a gated repo.", "set HF_TOKEN on every node"),
        ("Task was killed due to the node running low on memory.", "the node's memory is full"),
        ("OSError: [Errno 28] No space left on device: '/data/x'", "a disk is full"),
    ],
)
def test_known_causes_say_what_to_do(said: str, told: str) -> None:
    assert told in str(advice(f"Traceback (most recent call last):\n{said}"))
    assert told in with_causes(said).splitlines()[-1]


def test_an_unknown_cause_promises_nothing() -> None:
    assert advice("ValueError: no such checklist, in the ROOM of a BOOM") is None
    assert with_causes("ValueError: x") == "ValueError: x"


def test_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "abcd1234efgh")
    said = "key abcd1234efgh, hf_AbCdEfGhIj, Authorization: Bearer xyz.123, url?token=q1w2&x"
    kept = without_secrets(said)
    for secret in ("abcd1234efgh", "hf_AbCdEfGhIj", "xyz.123", "q1w2"):
        assert secret not in kept
    assert "<JUDGE_API_KEY>" in kept


DIES = """
import os, signal, sys, time, ray
ray.init(address="local", num_cpus=1, log_to_driver=False, logging_level="ERROR")
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.last_words import with_causes
class Replica:
    def live(self): return True
    def die(self):
        print("hf_abcdefghijkl: CUDA out of memory", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
replica = ray.remote(Replica).options(max_restarts=-1).remote()
try: ray.get(replica.die.remote())
except ray.exceptions.RayError: pass
for _ in range(100):
    try:
        ray.get(replica.live.remote())
        break
    except ray.exceptions.RayError: time.sleep(0.3)  # it restarts
print(with_causes("it died", RunDir(sys.argv[1]), "Replica"))
print(with_causes("another", RunDir(sys.argv[1]), "Nobody"))

from vpo_ray.stream.live_logs import cluster_here, living_logs
class Stage:
    def work(self): print("rendering with hf_abcdefghijkl", file=sys.stderr, flush=True)
stages = [
    ray.remote(type(f"MapWorker(MapBatches({name}))", (Stage,), {})).options(num_cpus=0).remote()
    for name in ("render", "score")
]
ray.get([stage.work.remote() for stage in stages])
found = list(living_logs(cluster_here(), "render", 1))
for name, said in found: print(f"alive: {name}: {said}")
print("others:", len(list(living_logs({**cluster_here(), "job": "ffffffff"}, None, 1))))
"""


@pytest.mark.ray
def test_the_log_of_a_replica_that_was_killed_is_kept_and_of_one_that_lives_shown(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)  # the state API would ask there
    command = [sys.executable, "-c", DIES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "it died\nthe last lines of its log:\n  <secret>: CUDA out of memory\nWhat to do: the GPU"
        in done.stdout
    )
    assert "\nanother\n" in done.stdout
    [log] = (tmp_path / "logs").iterdir()
    assert log.name.startswith("Replica-")
    assert log.read_text("utf-8") == "<secret>: CUDA out of memory\n"
    # Those that live are asked.
    [alive] = [line for line in done.stdout.splitlines() if line.startswith("alive: ")]
    assert alive.startswith("alive: render, process ")
    assert alive.endswith(": rendering with <secret>")
    assert done.stdout.endswith("others: 0\n")


def test_the_errors_of_a_log_are_each_told_once() -> None:
    log = (
        "ERROR 11-29 [x.py:9] ValueError: Available memory on node 0 (9/23 GiB) on startup is less than "
        "desired CPU memory utilization (0.92)\nTraceback\n  File\n"
        "RuntimeError: Engine core initialization failed.\n"
        "RuntimeError: Traceback (most recent call last):\nRuntimeError: Engine core initialization failed.\n"
    )
    first, second = errors_in(log)
    assert first.startswith("ValueError: Available memory")
    assert second == "RuntimeError: Engine core initialization failed."
    assert "VLLM_CPU_KVCACHE_SPACE" in (advice(log) or "")
