"""A Serve config file of the endpoint, for `serve deploy` and for a KubeRay RayService.

    vpo serve runs/one/checkpoints/dpo --recipe recipe.yaml --config > serve.yaml
    serve deploy serve.yaml

Deploying a file with another checkpoint rolls it out; the previous file rolls it back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from vpo_ray.recipe import Serve
from vpo_ray.storage.model_cache import version

APP = "vpo"
IMPORT_PATH = "vpo_ray.serve.app:app"
# Seconds beyond the longest answer: for queues, the network, the last chunk.
DRAIN_ROOM_S = 15


def serve_config(checkpoint: str, settings: Serve) -> dict[str, Any]:
    """The file as a tree. Keys at their defaults are left out; the proxy listens on every node."""
    arguments: dict[str, Any] = {"checkpoint": checkpoint}
    if chosen := settings.model_dump(mode="json", exclude_defaults=True):
        arguments["serve"] = chosen
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [
            {"name": APP, "route_prefix": "/", "import_path": IMPORT_PATH, "args": arguments},
        ],
    }


def config_file(checkpoint: str, settings: Serve) -> str:
    return yaml.safe_dump(serve_config(checkpoint, settings), sort_keys=False, allow_unicode=True)


def fingerprint(checkpoint: str | Path) -> str:
    """A fingerprint of the files of a checkpoint's folder or URI: path, sizes and modification times."""
    if "://" in str(checkpoint):
        return f"vpo-{version(str(checkpoint))[:16]}"
    folder = Path(checkpoint).resolve()
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir() if f.is_file())
    return f"vpo-{hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()[:16]}"


def operation(settings: Serve) -> dict[str, Any]:
    """Options of every deployment: a replica finishes its answers before it ends, and new replicas start
    before old ones stop, so that a roll-out fails no request."""
    return {"graceful_shutdown_timeout_s": settings.timeout_s + DRAIN_ROOM_S, "max_surge_percent": 100}
