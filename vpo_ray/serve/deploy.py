"""`vpo deploy`: bring the Serve instance of a cluster to a checkpoint, wait until it answers, and return.

It is what `serve deploy` does with a config file, for a job that follows training: the endpoint stays
when the job has ended. Other applications of the cluster are left as they are.
"""

from __future__ import annotations

import logging
import time

from vpo_ray.recipe import Serve
from vpo_ray.serve.app import build_app
from vpo_ray.serve.config import APP, serve_config
from vpo_ray.serve.engine import fingerprint
from vpo_ray.serve.run import check_settings
from vpo_ray.stream.ray_compat import serve_client

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class DeployError(RuntimeError):
    """The endpoint does not come up; the message has what Serve says."""


def roll_out(checkpoint: str, settings: Serve, timeout_s: float) -> None:
    """Make the cluster's endpoint serve this checkpoint with these settings.

    The same again changes nothing; another checkpoint, or other files in its folder, replaces the
    replicas one by one. Ray must be connected; Serve is started where it does not run yet.

    Args:
        timeout_s: how long the new replicas may take to load.

    Raises:
        PromptError: the folder is not a checkpoint of a policy.
        StorageError: a checkpoint's URI cannot be read.
        KeyFileError, SafetyFileError, ServiceError: a file or endpoint of the settings is not usable.
        DeployError: the replicas do not start, or not in time. What was deployed before goes on.
    """
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    check_settings(settings)
    # Whatever is wrong with the folder is told here in one line, and not by a task of Serve's.
    build_app(checkpoint, settings)
    wanted = serve_config(checkpoint, settings)
    wanted["applications"][0]["args"]["files"] = fingerprint(checkpoint)
    serve.start(proxy_location=wanted["proxy_location"], http_options=wanted["http_options"])
    client = serve_client()
    # A config names all applications of a cluster: one that it leaves out would be deleted.
    others = [
        app["deployed_app_config"]
        for name, app in client.get_serve_details()["applications"].items()
        if name != APP and app.get("deployed_app_config")
    ]
    wanted["applications"] += others
    client.deploy_apps(ServeDeploySchema.model_validate(wanted))
    _wait(timeout_s)


def _wait(timeout_s: float) -> None:
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while (status := serve.status().applications[APP]).status != "RUNNING":
        told = "; ".join(
            part for part in (status.message, *(each.message for each in status.deployments.values())) if part
        )
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise DeployError(f"the endpoint does not come up: {told}")
        if time.monotonic() > deadline:
            raise DeployError(
                f"the endpoint is {status.status} after {timeout_s:g} s: {told or 'no reason told'}"
            )
        time.sleep(LOOK_EVERY_S)
