"""`vpo submit`: hand a command of a recipe to a Ray cluster as a job, or as one job for each of N shards.

The job's id is a function of the recipe, its run directory, the command and the shard: Ray refuses a second
job of the same id, so that two people who submit the same run get one.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpo_ray.cli.steps import retrying_commands, sharded_commands, step_commands

if TYPE_CHECKING:
    from vpo_ray.recipe import Recipe
    from vpo_ray.records import Shard

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between two looks at a job
SILENCE_S = 300.0  # of a cluster, after which a job is followed no longer

# Each attempt at a run is a job of its own; the number tells them apart.
_ATTEMPT = re.compile(r"-(\d+)$")


class SubmitError(RuntimeError):
    """The job cannot be handed over; the message says why."""


class OptionError(ValueError):
    """Options that do not go together."""


class AlreadySubmittedError(SubmitError):
    """This run is submitted or running; the message names the job."""

    exit_status = 3


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo submit` its options."""
    parser.add_argument(
        "--command", dest="task", choices=commands(), help="default: run, or generate with --shards"
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="N jobs at one time, each of which takes a part of the queries",
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="of the cluster's dashboard, e.g. http://127.0.0.1:8265; RAY_API_SERVER_ADDRESS when absent",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", default=".", help="what travels: the recipe and files that it names"
    )
    parser.add_argument("--retry-errors", action="store_true", help="take rows that failed once more")
    parser.add_argument("--follow", action="store_true", help="show the job's log, and end as it ends")
    parser.add_argument("--print-id", action="store_true", help="print the submission id and submit nothing")


def commands() -> list[str]:
    """What may be a job."""
    return ["run", *step_commands(), "deploy"]


def submission_id(recipe: Recipe, task: str, shard: Shard | None = None) -> str:
    """The id of all attempts at this command of this recipe in this run directory, or at a shard of it."""
    from vpo_ray.records import content_id
    from vpo_ray.storage.run_dir import RunDir

    name = re.sub("[^a-z0-9]+", "-", recipe.name.lower()).strip("-")[:40] or "recipe"
    where = RunDir(recipe.out).uri
    parts = ["submission", recipe.fingerprint(), where, task, *([str(shard)] if shard else [])]
    task += f"-{shard.index}of{shard.of}" if shard else ""
    return f"vpo-{name}-{task}-{content_id(*parts, digits=12)}"


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Submit the job, or those of `--shards` that are not under way; with `--follow`, wait for them.

    Returns:
        0 when submitted, or with `--follow` the exit status of the job's command, the highest of several.

    Raises:
        OptionError: the command does not take an option that was given.
        AlreadySubmittedError: an attempt at this run, or at each of its shards, is not over.
        SubmitError: the recipe is a file outside the working directory, or the cluster does not answer.
        PackageError: a file that the recipe names cannot travel.
    """
    arguments.task = arguments.task or ("run" if arguments.shards is None else "generate")
    jobs = {submission_id(recipe, arguments.task, shard): shard for shard in _shards(arguments)}
    if arguments.print_id:
        sys.stdout.write("\n".join(jobs) + "\n")
        return 0
    import asyncio
    import tempfile

    from ray.job_submission import JobSubmissionClient

    from vpo_ray.cli.submit_package import PackageError, write_package

    if arguments.retry_errors and arguments.task not in {"run", *retrying_commands()}:
        raise OptionError(f"--retry-errors: {arguments.task} has no rows that failed to take again")
    entrypoint, path, folder = _entrypoint(arguments)
    _warn_of_what_is_lost(recipe)
    try:
        client = JobSubmissionClient(arguments.address)
        names, refused = [], []
        with tempfile.TemporaryDirectory(prefix="vpo-submit-") as aside:
            package = Path(aside, "package.zip")
            for base, shard in jobs.items():
                try:
                    name = _next_attempt(client, base)
                    if not package.exists():
                        write_package(recipe, path, folder, package, _everywhere(client))
                    words = entrypoint if shard is None else [*entrypoint, "--shard", str(shard)]
                    _submit(client, recipe, name, words, package)
                except AlreadySubmittedError as error:
                    refused.append(error)
                    continue
                sys.stdout.write(f"{name}\n")
                sys.stdout.flush()
                names.append(name)
    except (ConnectionError, RuntimeError) as error:
        if isinstance(error, SubmitError | PackageError):
            raise
        raise SubmitError(f"the cluster does not take the job: {error}") from error
    if not names:
        raise refused[0]
    for refusal in refused:
        logger.warning("%s", refusal)
    return asyncio.run(_follow_all(client, names)) if arguments.follow else 0


def _shards(arguments: argparse.Namespace) -> list[Shard | None]:
    """What each job takes: a shard, or for a single job None."""
    if arguments.shards is None:
        return [None]
    if arguments.task not in sharded_commands():
        raise OptionError(f"--shards: {arguments.task} does not work on shards of the queries")
    if arguments.shards < 1:
        raise OptionError(f"--shards: {arguments.shards} is not 1 or more")
    from vpo_ray.records import Shard

    return [Shard(index, arguments.shards) for index in range(1, arguments.shards + 1)]


def _submit(client: Any, recipe: Recipe, name: str, words: Sequence[str], package: Path) -> None:
    """Raises AlreadySubmittedError where somebody was quicker, RuntimeError where the cluster refuses."""
    try:
        client.submit_job(
            entrypoint=shlex.join(words),
            submission_id=name,
            runtime_env={"working_dir": str(package)},
            metadata={"recipe": recipe.name, "fingerprint": recipe.fingerprint(), "out": recipe.out},
        )
    except RuntimeError as error:
        if "already exists" in str(error):
            raise AlreadySubmittedError(f"somebody submitted this run at the same moment: {name}") from error
        raise


def _everywhere(client: Any) -> Callable[[str], bool]:
    """Whether an absolute path is the same on the cluster: this machine is a node of it, or the path is
    on a network filesystem."""
    from vpo_ray.cli.submit_package import is_node_of, on_shared_storage

    @functools.cache
    def here() -> bool:
        return is_node_of(client._do_request("GET", "/api/version").json().get("session_name") or "none")

    return lambda path: on_shared_storage(path) or here()


def _warn_of_what_is_lost(recipe: Recipe) -> None:
    for key, place in _written(recipe.model_dump(mode="json", exclude={"serve"})):
        if "://" not in place and not os.path.isabs(place):
            logger.warning(
                "%s: %s is a relative path, which on the cluster is in a copy of the working directory that "
                "goes with the job; name storage that every node has",
                key,
                place,
            )


def _written(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Where a run writes: its directory, videos and answers that were paid for; by dotted keys."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _written(value, f"{prefix}{name}.")
        elif name in ("out", "store", "answers") and isinstance(value, str):
            yield f"{prefix}{name}", value


def _entrypoint(arguments: argparse.Namespace) -> tuple[list[str], Path | None, Path]:
    """The words of the job's command, the recipe's file (None for one of the package, which goes by its
    name) and the working directory."""
    from vpo_ray.recipe.file import shipped

    given = [Path(name).expanduser() for name in (arguments.working_dir, arguments.recipe)]
    folder, recipe = (path.resolve() for path in given)
    # A link in the working directory travels as what it leads to.
    named = Path(os.path.relpath(os.path.abspath(given[1]), os.path.abspath(given[0])))
    linked = folder / named
    travels: Path | None = recipe
    if shipped(arguments.recipe):
        travels = None
    elif os.pardir not in named.parts and linked.is_file() and linked.samefile(recipe):
        travels = linked
    elif not recipe.is_file() or not recipe.is_relative_to(folder):
        raise SubmitError(
            f"{arguments.recipe} is not in the working directory {folder}, which is all that travels: "
            "give --working-dir"
        )
    name = arguments.recipe if travels is None else str(travels.relative_to(folder))
    words = ["python", "-m", "vpo_ray.cli", arguments.task, name]
    words += ["--out", arguments.out] if arguments.out else []
    for item in arguments.set:
        words += ["--set", item]
    return words + ["--retry-errors"] * arguments.retry_errors, travels, folder


def _next_attempt(client: Any, base: str) -> str:
    attempts = {}
    for job in client.list_jobs():
        name = job.submission_id or ""
        number = _ATTEMPT.search(name)
        if number and name == f"{base}-{number[1]}":
            attempts[int(number[1])] = job
    for job in attempts.values():
        if not job.status.is_terminal():
            raise AlreadySubmittedError(
                f"this run is {job.status.lower()} as {job.submission_id}. Look at it with `ray job logs "
                f"--follow {job.submission_id}`, or end it with `ray job stop {job.submission_id}`"
            )
    return f"{base}-{max(attempts, default=0) + 1}"


async def _follow_all(client: Any, names: Sequence[str]) -> int:
    import asyncio

    return max(await asyncio.gather(*(_follow(client, name) for name in names)))


async def _follow(client: Any, name: str) -> int:
    """Show a job's log until it is over; a connection that drops is made again.

    Returns:
        The exit status of its command as a shell has it: 0 only where the job succeeded.

    Raises:
        SubmitError: the cluster has not answered for `SILENCE_S`.
    """
    import asyncio

    import aiohttp

    shown, silent_since = 0, None
    while True:
        at = 0
        try:
            # Each connection gives the log from its beginning.
            async for lines in client.tail_job_logs(name):
                sys.stdout.write(lines[max(0, shown - at) :])
                sys.stdout.flush()
                at += len(lines)
                shown, silent_since = max(shown, at), None
            status, silent_since = client.get_job_status(name), None
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            if now - silent_since >= SILENCE_S:
                raise SubmitError(
                    f"the cluster does not answer any more, {name} may go on: look at it with `ray job logs "
                    f"--follow {name}` ({error})"
                ) from error
        else:
            if status.is_terminal():
                break
        await asyncio.sleep(POLL_S)
    if status == "SUCCEEDED":
        return 0
    info = client.get_job_info(name)
    logger.error("%s %s: %s", name, status.lower(), info.message)
    code: int = info.driver_exit_code or 1
    return code if code > 0 else 128 - code  # a signal ended it
