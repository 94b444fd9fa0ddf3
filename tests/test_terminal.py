"""What libraries say reaches a user only where it is a warning or an error that the user can act on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vpo_ray.terminal import NOT_FOR_USERS, Sieve

ROOT = Path(__file__).parents[1]

# As real runs wrote them.
NOISE = r"""
2026-11-29 01:35:51,424	INFO worker.py:1855 -- Calling ray.init() again after it has already been called.
2026-11-29 01:35:52,563	INFO streaming_executor.py:215 -- Starting execution of Dataset dataset_0355
[2026-11-29 01:35:52,595 E 2200 2200] core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches(sample))' and ID: '2b7f' has constructor arguments in the object store and max_restarts > 0. If they go out of scope
[2026-11-29 01:35:52,595 I 2200 2200] core_worker.cc:100: all is well
2026-11-29 17:54:22,391	WARNING worker.py:1681 -- SIGTERM handler is not set because current thread is not the main thread.
2026-11-29 01:35:52,706	WARNING __init__.py:28 -- Progress bars disabled. To enable, set it
[2026-11-29 01:31:23,962] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU. If you have one
[2026-11-29 01:31:23,962] [INFO] [comm.py:652:init_distributed] cdb=None
INFO 11-29 01:31:23 [utils.py:233] non-default args: {}
(EngineCore pid=44) INFO 11-29 01:31:23 [core.py:1] loading
I1129 01:31:23.000000 123 torch.cpp:1] x
Converting and de-quantizing GGUF tensors...:   0%|          | 0/272 [00:00<?, ?it/s]
Writing model shards: 0it [00:00, ?it/s]
Loading weights:  99%|█████████▉| 271/272 [00:00<00:00, 20213.16it/s, Materializing param=lm_head.weight]
No cloud storage mirror configured
{"asctime": "2026-11-29", "levelname": "INFO", "message": "HTTP Request: GET http://127.0.0.1", "name": "httpx"}
/x/torch/distributed/c10d.py:1: FutureWarning: `torch.distributed.reduce_op` is deprecated
  return reduce_op()
[33m(raylet)[0m Task ServeController.graceful_shutdown failed. There are infinite retries remaining
""".strip("\n").split("\n")  # noqa: E501

MEANT = """
2026-11-29 01:35:52,706	WARNING actor.py:28 -- The cluster has no room for a replica
[2026-11-29 01:47:43,404 E 2200 2568] rpc_client.h:204: Failed to connect to GCS within 60 seconds.
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
ImportError: libcuda.so.1: cannot open shared object file: No such file or directory
ERROR 11-29 01:31:23 [core.py:1] EngineCore failed to start
/x/y.py:1: UserWarning: the video has no frame
INFORMATION is what a user may write
100% of the rows failed
Traceback (most recent call last):
  File "x.py", line 1, in <module>
Aborted
""".strip("\n").split("\n")


@pytest.mark.parametrize("line", NOISE)
def test_noise_is_left_out(line: str) -> None:
    sieve = Sieve()
    if line.startswith("  "):
        assert sieve.keep(NOISE[NOISE.index(line) - 1]) is None
    assert sieve.keep(line) is None


def test_what_may_matter_comes_through_as_it_is() -> None:
    sieve = Sieve()
    assert [sieve.keep(line) for line in MEANT] == MEANT


def test_an_error_behind_a_bar_is_shown_without_the_bar() -> None:
    bars = "\rLoading weights:   0%|          | 0/272 [00:00<?, ?it/s]" * 2
    assert Sieve().keep(f"{bars}RuntimeError: no such tensor") == "RuntimeError: no such tensor"


def test_every_exception_has_its_reason() -> None:
    assert all(len(reason) > 7 for reason in NOT_FOR_USERS.values())


SPEAKS = """
import logging, os, sys, threading
from vpo_ray import terminal
from vpo_ray.cli import console
console.forgive()
if "plain" not in sys.argv: console.sift_stderr()
terminal.ours().write("ours 2026 INFO x 10%|  | 1/2 [00:00<?]\\n")
sys.stdout.write("a result: INFO\\n")
os.write(2, b"INFO from C\\nwarning from C\\n")
thread = threading.Thread(target=print, args=("INFO (raylet) printed",), name="ray_print_logs")
thread.start(); thread.join()
log = logging.getLogger("DeepSpeed"); log.addHandler(logging.StreamHandler(sys.stdout)); log.propagate = False
log.warning("Setting accelerator to CPU. If you have GPU"); log.warning("a real one")
print("half a line", end="", file=sys.stderr, flush=True)
if "abort" in sys.argv: os.abort()
"""


def speak(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SPEAKS, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_command_shows_its_own_lines_and_what_may_matter() -> None:
    done = speak()
    assert done.stdout == "a result: INFO\na real one\n"
    assert sorted(re.split(r"\n", done.stderr)) == sorted(
        ["ours 2026 INFO x 10%|  | 1/2 [00:00<?]", "warning from C", "half a line"]
    )


def test_without_the_sieve_everything_is_shown() -> None:
    assert "INFO from C" in speak("plain").stderr


def test_the_last_words_of_a_command_that_crashes_come_through() -> None:
    done = speak("abort")
    assert done.returncode < 0
    assert "half a line" in done.stderr


@pytest.mark.engine
@pytest.mark.slow
def test_a_command_says_nothing_that_others_said(
    tiny_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ROOT / "jobs/recipes/tiny.yaml"
    fewer = ["--set", "sft.epochs=0.1", "--set", "sft.workers=1"]
    command = [sys.executable, "-m", "vpo_ray.cli", "sft", str(recipe), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [*command, *tiny_sets, *fewer], env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    foreign = [line for line in done.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d [IW] ", line)]
    assert foreign == []
    assert done.stdout == f"sft: done, see {tmp_path}/run/ledger.json\n"
