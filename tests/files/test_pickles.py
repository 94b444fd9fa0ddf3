"""Pickles of others: tensors come out, and nothing that they name is run."""

import builtins
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vpo_ray.files.pickle_child import RefusedError, load_tensors
from vpo_ray.files.pickles import PickleError, read_pickle

ROOT = Path(__file__).parents[2]


class Runs:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def nested(touched: Path) -> Any:
    """A pickle in a pickle, which torch's own storages would open without asking."""
    from torch.storage import _load_from_bytes

    stream = io.BytesIO()
    torch.save(Runs(os.system, f"touch {touched}"), stream)
    return Runs(_load_from_bytes, stream.getvalue())


def test_a_pickle_that_wants_to_run_code_is_refused_by_name(tmp_path: Path) -> None:
    touched, source, target = tmp_path / "touched", tmp_path / "evil.pth", tmp_path / "out.safetensors"
    torch.save({"weight": torch.ones(1, 3), "more": Runs(os.system, f"touch {touched}")}, source)
    with pytest.raises(PickleError) as refused:
        read_pickle(source, target, stand_ins=True)
    assert "evil.pth wants to run code when it is opened (posix.system): it was not run" in str(refused.value)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("stand_ins", [True, False])
def test_nothing_of_pythons_own_is_run(tmp_path: Path, zipped: bool, stand_ins: bool) -> None:
    touched, source = tmp_path / "touched", tmp_path / "evil.pth"
    for evil, name in (
        (Runs(os.system, f"touch {touched}"), r"posix\.system"),
        (Runs(builtins.eval, f"open({str(touched)!r}, 'w')"), r"builtins\.eval"),
        (Runs(subprocess.Popen, ["touch", str(touched)]), r"subprocess\.Popen"),
    ):
        weights = {"weight": torch.ones(1, 3), "more": evil}
        torch.save(weights, source, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RefusedError, match=name):
            load_tensors(str(source), stand_ins)
    assert not touched.exists()


def test_a_pickle_within_is_not_opened(tmp_path: Path) -> None:
    touched, source = tmp_path / "touched", tmp_path / "evil.pth"
    torch.save({"weight": torch.ones(2), "more": nested(touched)}, source)
    with pytest.raises(RefusedError, match=r"torch\.storage\._load_from_bytes"):
        load_tensors(str(source), stand_ins=False)
    # The function is stood in for, and holds bytes.
    tensors, stood_in = load_tensors(str(source), stand_ins=True)
    assert (list(tensors), stood_in) == (["weight"], ["torch.storage._load_from_bytes"])
    assert not touched.exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    touched, source = tmp_path / "touched", tmp_path / "evil.pth"
    source.write_bytes(pickle.dumps(Runs(os.system, f"touch {touched}")))
    with pytest.raises(RefusedError, match=r"posix\.system"):
        load_tensors(str(source), stand_ins=True)
    source.write_bytes(b"cos\nsystem\n(S'touch " + bytes(touched) + b"'\ntR.")
    with pytest.raises(RefusedError, match=r"os\.system"):
        load_tensors(str(source), stand_ins=True)
    assert not touched.exists()
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("a/constants.pkl", pickle.dumps(()))
        archive.writestr("a/data.pkl", pickle.dumps({}))
    with pytest.raises(RefusedError, match="TorchScript, which is code"):
        load_tensors(str(source), stand_ins=True)
    torch.save({"epoch": 3}, source)
    with pytest.raises(ValueError, match="no tensors in it, but a dict"):
        load_tensors(str(source), stand_ins=True)
    source.write_bytes(b"<html>404</html>")
    with pytest.raises(PickleError, match=r"no file of torch\.save that can be read"):
        read_pickle(source, tmp_path / "out.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_out_as_they_were(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(6, 4)
    saved = OrderedDict(
        a=base, tied=base, part=base[1:3], turned=base.T, half=torch.randn(3).bfloat16(), none=torch.zeros(0),
        inner={"deep": torch.arange(4), "parameter": torch.nn.Parameter(torch.randn(2))}, epoch=3,
    )  # fmt: skip
    source, target = tmp_path / "weights.pth", tmp_path / "out.safetensors"
    torch.save(saved, source, _use_new_zipfile_serialization=zipped)
    if zipped:
        assert read_pickle(source, target) == []
        found = load_file(target)
    else:
        found, stood_in = load_tensors(str(source), stand_ins=True)
        assert stood_in == []
    names = {"a", "tied", "part", "turned", "half", "none", "inner.deep", "inner.parameter"}
    assert found.keys() == names
    for name, tensor in found.items():
        wanted = saved["inner"][name.removeprefix("inner.")] if "." in name else saved[name]
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


def test_classes_are_refused_or_stood_in_for_and_never_imported(tmp_path: Path) -> None:
    (tmp_path / "upstream.py").write_text(
        "import torch, os\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GELU())\n"
        "        self.act = torch.nn.functional.gelu\n"
        "        self.register_buffer('steps', torch.arange(3))\n"
        "if 'seen' in os.environ: torch.save(Model(), os.environ['seen'])\n"
        "else: raise SystemError('imported')\n",
        "utf-8",
    )
    source, target = tmp_path / "model.pth", tmp_path / "out.safetensors"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "seen": str(source)}
    subprocess.run([sys.executable, "-c", "import upstream"], env=env, check=True, timeout=120)
    with pytest.raises(RefusedError, match=r"upstream\.Model"):
        load_tensors(str(source), stand_ins=False)
    stood_in = read_pickle(source, target, stand_ins=True)
    assert {"upstream.Model", "torch.nn.modules.linear.Linear"} <= set(stood_in)
    assert {name: list(t.shape) for name, t in load_file(target).items()} == {
        "inner.0.weight": [2, 3], "inner.0.bias": [2], "steps": [3],
    }  # fmt: skip


CONNECT = """
import json, os, socket, sys
from vpo_ray.files.pickle_child import without_network
why = without_network()
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=5).close()
    reached = True
except OSError:
    reached = False
print(json.dumps([why, reached]))
"""


def test_its_process_reaches_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=server.accept, daemon=True)
        accepting.start()
        code = CONNECT.format(port=server.getsockname()[1])
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=env,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    why, reached = json.loads(done.stdout)
    assert reached == bool(why), "it is cut off, or says that it could not be"


def test_a_process_that_dies_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "big.pth"
    torch.save({"a": torch.zeros(3)}, source)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PickleError, match="the process that reads it failed"):
        read_pickle(source, tmp_path / "out.safetensors")
