"""The process that opens a pickle of others: it has no network, few rights, and a reader that runs nothing.

`pickles.read_pickle` starts it, and it writes the pickle's tensors to a safetensors file. Beyond tensors and
plain containers, a pickle may name classes and functions. None is imported: where the caller expects classes
of libraries, each becomes an inert stand-in that holds what is put in; anything else is refused by name. Only
the standard library is imported before the network is taken away, which takes a process of one thread.
"""

from __future__ import annotations

import _compat_pickle
import ctypes
import json
import os
import pickle
import resource
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # CLONE_NEWNET, CLONE_NEWUSER
_CPU_S = 3600
_SPARE = 2**32  # bytes, beside what the pickle takes
_PLAIN = {
    f"builtins.{kind.__name__}": kind
    for kind in (set, frozenset, list, dict, tuple, int, float, complex, bool, str, bytes, bytearray, slice)
}
# What a model may hold of Python's own library, where stand-ins are made. All else of it is refused.
_HARMLESS = {
    "functools",
    "enum",
    "typing",
    "pathlib",
    "datetime",
    "dataclasses",
    "re",
    "collections",
    "copyreg",
}
_PARTS = ("_parameters", "_buffers", "_modules")


class RefusedError(Exception):
    """A pickle that names what it may not; the message is that name."""


class StandIn:
    """An object of a class that is not imported: what a pickle puts into it, and nothing else."""

    held: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.held = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def without_network() -> str:
    """Leave the network for an empty one; why that is not possible here, or nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_NEW_NETWORK, _NEW_NETWORK | _NEW_USER):
        if getattr(libc, "unshare", None) is not None and libc.unshare(flags) == 0:
            return ""
    return os.strerror(ctypes.get_errno())


def _limit(size: int) -> None:
    with open("/proc/self/statm") as stream:
        taken = int(stream.read().split()[0]) * resource.getpagesize()
    for what, most in {
        resource.RLIMIT_AS: taken + 4 * size + _SPARE,
        resource.RLIMIT_FSIZE: 4 * size + _SPARE,
        resource.RLIMIT_CPU: _CPU_S,
        resource.RLIMIT_CORE: 0,
    }.items():
        hard = resource.getrlimit(what)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be taken off: no sockets and no processes, should anything ask for them."""
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn")):
        raise RefusedError(event)


def _real() -> dict[str, Any]:
    """What a pickle of tensors is made of, by name: none of it does more than build a value."""
    import torch

    found = {
        "collections.OrderedDict": OrderedDict,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "torch.UntypedStorage": torch.UntypedStorage,
        "torch.storage.UntypedStorage": torch.UntypedStorage,
        "copyreg._reconstructor": _reconstructed,
        "_codecs.encode": _encoded,
    }
    found |= {f"torch._utils.{name}": getattr(torch._utils, name) for name in (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter",
    )}  # fmt: skip
    found |= {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return {**_PLAIN, **found}


def _reconstructed(kind: Any, base: Any, state: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, StandIn):
        return kind()
    raise RefusedError(f"an object of {kind!r}")


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """How pickles before protocol 3 hold bytes."""
    if encoding != "latin1":
        raise RefusedError(f"_codecs.encode with {encoding}")
    return text.encode("latin1")


def reader(stand_ins: bool, stood_in: dict[str, type]) -> Any:
    """What `torch.load` takes for the module `pickle`.

    Args:
        stand_ins: classes of libraries are stood in for, and kept in `stood_in` by name; otherwise refused.
    """
    real = _real()

    class RestrictedUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            # Python 2's names, as pickle itself would read them.
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            full, root = f"{module}.{name}", module.partition(".")[0]
            if full in real:
                return real[full]
            is_harmless = (
                root in _HARMLESS or root not in sys.stdlib_module_names or full == "builtins.getattr"
            )
            if not stand_ins or not is_harmless:
                raise RefusedError(full)
            return stood_in.setdefault(full, type(name, (StandIn,), {}))

    def load(stream: Any, **options: Any) -> Any:
        return RestrictedUnpickler(stream, **options).load()

    return SimpleNamespace(Unpickler=RestrictedUnpickler, load=load, __name__="restricted")


def tensors_in(value: Any) -> dict[str, Any]:
    """The tensors of a state dict, or of a module that was pickled whole, by dotted name."""
    import torch

    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            for key, part in value.items():
                walk(part, f"{name}.{key}" if name else str(key))
        elif isinstance(value, StandIn) and isinstance(value.held, Mapping):
            for part in _PARTS:
                walk(value.held.get(part) or {}, name)

    walk(value, "")
    return found


def _write(tensors: dict[str, Any], path: str) -> None:
    from safetensors.torch import save_file

    stored: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        at = plain.untyped_storage().data_ptr()
        # One that shares its memory is written out on its own.
        tensors[name] = (
            plain.clone() if at in stored or plain.nbytes < plain.untyped_storage().nbytes() else plain
        )
        stored.add(at)
    save_file(tensors, path)


def load_tensors(source: str, stand_ins: bool) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a file of `torch.save` by name, and the classes that were stood in for.

    Raises:
        RefusedError: it names what it may not.
    """
    import torch

    is_zip = zipfile.is_zipfile(source)
    if is_zip and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(source).namelist()):
        raise RefusedError("TorchScript, which is code")
    stood_in: dict[str, type] = {}
    value = torch.load(
        source, map_location="cpu", pickle_module=reader(stand_ins, stood_in), weights_only=False, mmap=is_zip
    )
    tensors = tensors_in(value)
    if not tensors:
        raise ValueError(f"no tensors in it, but a {type(value).__name__}")
    return tensors, sorted(stood_in)


def open_pickle() -> None:
    """What to do comes by stdin as JSON; what came of it goes to stdout as the last line."""
    asked = json.load(sys.stdin)
    answer: dict[str, Any] = {"network": without_network()}
    try:
        import torch  # noqa: F401

        _limit(os.path.getsize(asked["source"]))
        sys.addaudithook(_watch)
        tensors, answer["stand_ins"] = load_tensors(asked["source"], asked["stand_ins"])
        _write(tensors, asked["target"])
    except RefusedError as error:
        answer["refused"] = str(error)
    except Exception as error:  # noqa: BLE001  # told by the process that asked
        answer["error"] = f"{type(error).__name__}: {error}"
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
