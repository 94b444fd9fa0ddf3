"""`vpo deploy`: deploy a checkpoint into a cluster's Serve instance, and wait until it answers.

It does what `serve deploy` does with a config file, for a job that follows training: the endpoint stays when
the job has ended. Other applications of the cluster are not changed.
"""

from __future__ import annotations

import logging
import time

from vpo_ray.recipe import Serve
from vpo_ray.serve.app import build_app
from vpo_ray.serve.config import APP, fingerprint, serve_config
from vpo_ray.serve.run import check_settings
from vpo_ray.stream.ray_compat import serve_client

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class DeployError(RuntimeError):
    """The endpoint does not start; the message has what Serve says."""


def roll_out(checkpoint: str, settings: Serve, timeout_s: float) -> None:
    """Make the cluster's endpoint serve this checkpoint with these settings.

    Repeating the call changes nothing. Another checkpoint, or changed files in its folder, replaces the
    replicas one by one. Ray must be connected; Serve is started if it does not run yet.

    Args:
        timeout_s: how long the new replicas may take to load.

    Raises:
        PromptError: the folder is not a checkpoint of a policy.
        StorageError: a checkpoint's URI cannot be read.
        KeyFileError, SafetyFileError, ServiceError, SecretMissing: a file, endpoint or secret of the settings
            is not usable.
        DeployError: the replicas do not start, or not in time. The earlier deployment keeps running.
    """
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    check_settings(settings)
    # A fault of the folder is reported here in one line, not by a task of Serve's.
    build_app(checkpoint, settings)
    wanted = serve_config(checkpoint, settings)
    wanted["applications"][0]["args"]["files"] = fingerprint(checkpoint)
    serve.start(proxy_location=wanted["proxy_location"], http_options=wanted["http_options"])
    client = serve_client()
    # A config names all applications of a cluster: Serve would delete one that it leaves out.
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
        messages = "; ".join(
            part for part in (status.message, *(each.message for each in status.deployments.values())) if part
        )
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise DeployError(f"the endpoint does not start: {messages}")
        if time.monotonic() > deadline:
            raise DeployError(
                f"the endpoint is {status.status} after {timeout_s:g} s: {messages or 'no reason given'}"
            )
        time.sleep(LOOK_EVERY_S)
