"""Fixtures that several test folders share."""

import ctypes
import gc
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint_server import EndpointServer, Reply, Request
from hypothesis import HealthCheck, settings

# A checkpoint with its reference's outputs; it lies beside the repository, where it is at all.
# Machines here are shared: a slow example says nothing about the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"

# What takes longest starts first, so that none of it runs alone at the end: tests of the one endpoint, and
# the files with real engines or training that take twenty seconds or more.
LONG = (
    "tests/serve",
    "tests/train/test_job",
    "tests/evaluation/test_evaluating",
    "tests/chaos",
    "tests/test_jobs",
    "tests/loop/test_loop",
    "tests/stream/test_pipeline",
    "tests/stream/test_video_service_run",
    "tests/stages/test_render_pool",
    "tests/world/test_world_video",
    "tests/evaluation/test_under_a_profile",
    "tests/world/test_smollm2",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, help="the order of the tests: by chance without it, as they are written with 0"
    )


def pytest_configure(config: pytest.Config) -> None:
    # The servers of the tests are on this machine, where a user's proxy cannot reach them.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
    if config.option.seed is None:
        config.option.seed = random.randrange(1, 10**6)
    config.option.seed = getattr(config, "workerinput", {}).get("seed", config.option.seed)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """The workers of pytest-xdist have one order."""
    node.workerinput["seed"] = node.config.option.seed


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a process takes a file, or all those of serving, which share an endpoint whose
    engine takes long to start."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/serve" if nodeid.startswith("tests/serve/") else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"The tests ran in the order of --seed {config.option.seed}.")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Folders, their files and these files' tests are shuffled, each within the one above. Behind that,
    pytest puts those together that share a parameter of a fixture."""
    if config.option.seed:
        # A folder, a file or a test has its place by the seed and its name: few tests come in the same
        # order as many.
        def places(item: pytest.Item) -> list[float]:
            names = item.nodeid.replace("::", "/").split("/")
            above = ["/".join(names[:n]) for n in range(1, len(names) + 1)]
            return [random.Random(f"{config.option.seed} {name}").random() for name in above]

        items.sort(key=places)
    yield
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if item.nodeid.startswith(name)), 99))


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests run in an empty folder, wherever they were started: what earlier commands left in the
    checkout (`runs/`) is not there."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("elsewhere")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def _nothing_left_there(_elsewhere: Path) -> Iterator[None]:
    yield
    assert os.getcwd() == str(_elsewhere)
    assert os.listdir() == [], "a test leaves nothing in the working directory"


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """The permissions of files hold for root too: this thread gives up CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH meanwhile. Anyone else has neither."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: of capabilities 0-31, then of 32-63
    assert libc.capget(header, before) == 0
    fewer = (ctypes.c_uint32 * 6)(*before)
    fewer[0] &= ~0b110
    assert libc.capset(header, fewer) == 0
    yield
    assert libc.capset(header, before) == 0


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The commands set up the log of their process, which here is that of the tests."""
    ours, root = logging.getLogger("vpo_ray"), logging.getLogger()
    before = ours.handlers, ours.propagate, ours.level, root.level
    yield
    ours.handlers, ours.propagate = before[:2]
    ours.setLevel(before[2])
    root.setLevel(before[3])


@pytest.fixture(scope="session")
def s3_options() -> Iterator[str]:
    """An S3 server with the bucket `videos`: the options of an `s3://` URI that lead to it. Credentials
    are in the environment."""
    import pyarrow.fs as pafs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        fs, _ = pafs.FileSystem.from_uri(f"s3://videos?{options}&allow_bucket_creation=true")
        fs.create_dir("videos")
        yield options
    moto.stop()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints `policy`, `judge`, `video` and `reward`; read only."""
    from vpo_ray.world.tiny import make_tiny

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden values of the reward model."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden folder is not here")
    return GOLDEN


@pytest.fixture(scope="session")
def clip() -> Callable[..., bytes]:
    """Makes mp4 bytes of random frames at 8 fps: clip(seed, frames=9, height=64, width=96)."""
    from vpo_ray.engines.video.engine import encode

    def make(seed: int, frames: int = 9, height: int = 64, width: int = 96) -> bytes:
        noise = np.random.default_rng(seed)
        coarse = noise.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
        return encode(coarse.repeat(8, axis=1).repeat(8, axis=2), 8, 12)

    return make


@pytest.fixture
def serve_endpoint() -> Iterator[Callable[[Callable[[Request], Reply]], EndpointServer]]:
    """Starts OpenAI-compatible servers: serve_endpoint(reply), where `reply` answers one request."""
    servers: list[EndpointServer] = []

    def start(reply: Callable[[Request], Reply]) -> EndpointServer:
        servers.append(EndpointServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def tiny_sets(tiny_models: Path) -> list[str]:
    """The `--set` options that point the tiny recipe to the tiny checkpoints."""
    values = {
        "policy.model": tiny_models / "policy",
        "judge.model": tiny_models / "judge",
        "render.model": tiny_models / "video",
        "reward.model": tiny_models / "reward",
        "reward.checklist.file": tiny_models / "reward/checklist.yaml",
        "sft.data": Path(__file__).parents[1] / "vpo_ray/data/sft.jsonl",
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def adapted(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A LoRA adapter on the tiny policy, with random weights: its folder, and the model for peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from vpo_ray.engines.chat.tokenizer import load_tokenizer
    from vpo_ray.prompts.policy_prompt import read_prompt

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_models / "policy")
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, folder = get_peft_model(base, config), tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    load_tokenizer(str(tiny_models / "policy"), read_prompt("builtin:policy")).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster of 4 logical CPUs for the whole session."""
    import ray

    # The paths of Ray's sockets may have 107 characters, so its folder has a short name.
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it in every test."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Plugins import modules at the end, and Python 3.11 may fail to parse one (SystemError, "AST constructor
    recursion depth mismatch") while garbage of the tests is finalised."""
    gc.collect()
