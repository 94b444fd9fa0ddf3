"""Run the endpoint until interrupted (`vpo serve CHECKPOINT`), or for one query (`make demo`)."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vpo_ray.recipe import Serve
from vpo_ray.serve.answer_ids import AnswerIds
from vpo_ray.serve.config import APP
from vpo_ray.serve.keys import KeyRing
from vpo_ray.serve.ranking import Ranker
from vpo_ray.serve.refine_schema import Refinements
from vpo_ray.serve.safety import Gate
from vpo_ray.stream.last_words import advice, errors_in, said_here

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5


class ServeError(RuntimeError):
    """The endpoint does not start; the message has what its replica said."""


class ServeRunsError(RuntimeError):
    """Another Serve instance runs on this cluster, with its own host and port."""


@contextmanager
def serving(checkpoint: str, settings: Serve) -> Iterator[str]:
    """Deploy the endpoint, yield its base URL for an OpenAI client, and remove it at the end.

    Ray must be connected.

    Raises:
        PromptError, StorageError: there is no checkpoint of a policy (see `build_app`).
        KeyFileError, SafetyFileError, ServiceError, SecretMissing: a file, endpoint or secret of the settings
            is not usable.
        ServeError: a replica does not start.
        ServeRunsError: another Serve instance runs on this cluster.
    """
    import ray
    from ray import serve

    from vpo_ray.serve.app import build_app

    # Serve logs every step of a deployment; problems are logged above this level.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    check_settings(settings)
    app = build_app(checkpoint, settings)
    if serve.status().proxies:
        raise ServeRunsError(
            "Ray Serve already runs on this cluster: deploy into it with `serve deploy`, or stop it"
        )
    port = settings.port or free_port(settings.host)
    gcs = ray.get_runtime_context().gcs_address
    serve.start(http_options={"host": settings.host, "port": port})
    try:
        try:
            serve.run(app, name=APP, route_prefix="/")
        except RuntimeError as error:
            raise ServeError(_why(error)) from error
        yield f"http://{settings.host}:{port}/v1"
    finally:
        _stop(gcs)


def _why(error: RuntimeError) -> str:
    """Serve's message with what the last replica that did not start said, and what to do about it."""
    said = said_here(f"ServeReplica:{APP}:")
    lines = [str(error), *(f"  {line}" for line in errors_in(said))]
    if (what := advice(said)) is not None:
        lines.append(f"What to do: {what}")
    return "\n".join(lines)


def _stop(gcs: str) -> None:
    """Remove the endpoint, unless its cluster is gone: the same signal may have stopped that too (a service
    manager sends it to all processes), and Ray would wait a minute for an answer."""
    from ray import serve

    failures: list[BaseException] = []

    def remove() -> None:
        try:
            # Deleting waits for running answers, shutting down does not.
            serve.delete(APP)
            serve.shutdown()
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)

    removing = threading.Thread(target=remove, daemon=True)
    removing.start()
    while removing.is_alive():
        removing.join(LOOK_EVERY_S)
        if removing.is_alive() and not _answers(gcs):
            logger.warning("the Ray cluster at %s is gone, and the endpoint with it", gcs)
            return
    if failures:
        raise failures[0]


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def deploy(checkpoint: str, settings: Serve) -> None:
    """Replace the checkpoint in the running Serve instance.

    New replicas start before old ones stop, and the old ones finish their requests, so that none fails. It
    returns when only the new ones answer. Deploying the old checkpoint rolls it back.
    """
    from ray import serve

    from vpo_ray.serve.app import build_app

    serve.run(build_app(checkpoint, settings), name=APP, route_prefix="/")


def check_settings(settings: Serve) -> None:
    """Check early, in one line, what replicas would fail on. Raises what `serving` names."""
    if settings.keys:
        KeyRing(settings.keys)
    elif settings.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("anyone who reaches %s may call: serve.keys is not set", settings.host)
    Gate(settings.safety)
    if settings.feedback is not None:
        AnswerIds(settings.feedback.secret_env)
    if settings.best_of:
        Ranker(settings.best_of)
    if settings.videos is not None and settings.videos.refine is not None:
        Refinements(settings)


def serve_forever(checkpoint: str, settings: Serve) -> None:
    """Serve until SIGINT or SIGTERM; running answers are finished first. Before there are any, while replicas
    load, a signal interrupts."""
    stop = threading.Event()
    with serving(checkpoint, settings) as url:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        logger.info("serving %s as %r at %s", checkpoint, settings.model_name, url)
        stop.wait()
        logger.info("stopping: running answers are finished first")


# What an answer of the policy itself depends on.
_OF_POLICY = (
    "temperature", "top_p", "max_tokens", "max_query_chars", "images", "timeout_s", "retries", "engine"
)  # fmt: skip


def alone(settings: Serve) -> Serve:
    """Settings for one query to the policy, on loopback and a free port: one replica, and nothing that the
    endpoint has or asks beside it. Its keys, services and files may be on other machines alone."""
    pool = settings.pool.model_copy(update={"size": (1, 1)})
    kept = {name: getattr(settings, name) for name in _OF_POLICY}
    return Serve().model_copy(update={**kept, "pool": pool, "host": "127.0.0.1", "port": 0})


def ask(checkpoint: str, settings: Serve, query: str) -> str:
    """The optimised prompt of one query, from the real endpoint. Raises what `serving` raises, and
    openai.APIStatusError where the policy gives no answer."""
    from openai import OpenAI

    local = alone(settings)
    with serving(checkpoint, local) as url:
        client = OpenAI(base_url=url, api_key="none", timeout=120)
        answer = client.chat.completions.create(
            model=local.model_name, seed=0, messages=[{"role": "user", "content": query}]
        )
    return answer.choices[0].message.content or ""


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
