"""A Serve config file of the endpoint, for `serve deploy` and for a KubeRay RayService.

    vpo serve runs/one/checkpoints/dpo --recipe recipe.yaml --config > serve.yaml
    serve deploy serve.yaml

Deploying a file with another checkpoint rolls it out; the previous file rolls it back.
"""

from __future__ import annotations

from typing import Any

import yaml

from vpo_ray.recipe import Serve

APP = "vpo"
IMPORT_PATH = "vpo_ray.serve.app:app"


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
