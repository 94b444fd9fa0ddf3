"""A run directory as a driver has it: opened for a recipe, locked, and with a ledger at the end.

with opened(recipe) as run, accounted(recipe, run):
    ...
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import yaml

from vpo_ray.files.folder import DamagedError, StorageError
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.loop.policies import is_sampled
from vpo_ray.recipe import Recipe, differences, parse_stored, plugins
from vpo_ray.records import Shard
from vpo_ray.stages.preview import MEASURED
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.run_lock import check, driving
from vpo_ray.storage.run_state import working
from vpo_ray.stream.connection import terminate
from vpo_ray.versions import versions

logger = logging.getLogger(__name__)


# Sections that only choose among the rows of feedback/.
_PAIRING = frozenset({"pair", "formula"})
# Keys of `sft` that say what is learnt, not how.
_SFT_DATA = ("sft.data", "sft.profile_column", "sft.image_column")


class OtherRecipeError(ValueError):
    """The run directory belongs to a recipe that computes something else; the message says what."""


def open_run(recipe: Recipe, shard: Shard | None = None) -> RunDir:
    """The recipe's run directory, made if absent.

    Args:
        shard: what this driver takes; it leaves the run's own files to the driver of the whole run.

    Raises:
        OtherRecipeError: the directory was made by a recipe that computes something else, or is no run's.
    """
    run = RunDir(recipe.out)
    if run.exists("recipe.yaml"):
        if not run.exists("versions.json"):
            raise OtherRecipeError(
                f"{run.uri} holds a recipe.yaml that no run wrote: give the recipe an `out` of its own"
            )
        # Parsed, so that a key which is newer than the run counts with its default.
        stored = parse_stored(yaml.safe_load(run.read("recipe.yaml")), run.at("recipe.yaml"))
        changed = differences(stored.dump(), recipe.dump())
        anew = _previews_anew(run, changed) or _learns_anew(run, stored, recipe, changed)
        if changed and not anew:
            # One that is not here has no version to compare.
            absent = plugins.plugin_problems(plugins.plugins_of(recipe))
            changed += [f"{key}: {why}" for key, why in absent.items()]
            raise OtherRecipeError(
                f"{run.uri} was made by another recipe. These keys differ:\n  "
                + "\n  ".join(changed)
                + "\nGive the new recipe another `out`, or put the old values back"
                + _how_to_learn_anew(run, stored, recipe, changed)
            )
    if shard is not None:
        return run
    run.move_meta()
    # The recipe comes last: one without versions is somebody's own.
    run.write_json("versions.json", versions())
    run.write("recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False).encode())
    return run


def _learns_anew(run: RunDir, stored: Recipe, recipe: Recipe, changed: list[str]) -> bool:
    """Whether a recipe differs only in how phases learn, or in how pairs are chosen of the feedback that is
    there, and no policy was trained in the old way."""
    sft = [line for line in changed if line.startswith("sft.") and not line.startswith(_SFT_DATA)]
    last = [line for line in changed if line not in sft]
    if not changed or (sft and _sampled(run)):
        return False
    if last and (not _differs_in_learning(stored, recipe, last) or _trained(run, recipe)):
        return False
    logger.info("%s goes on with other settings of what is not trained yet: %s", run.uri, "; ".join(changed))
    return True


def _previews_anew(run: RunDir, changed: list[str]) -> bool:
    """Whether a recipe differs only in its previews, and none was chosen by previews of the old kind."""
    if not changed or not all(line.startswith("render.preview") for line in changed):
        return False
    measured = run.read_json(MEASURED) if run.exists(MEASURED) else {}
    if measured.get("chosen"):
        return False
    logger.info("candidates are previewed anew in %s: %s", run.uri, "; ".join(changed))
    return True


def _differs_in_learning(stored: Recipe, recipe: Recipe, changed: list[str]) -> bool:
    """Whether a recipe differs only in how its last phase learns and what that learns of the feedback."""
    sections = {line.split(".")[0].split(":")[0] for line in changed}
    # Adaptive rendering makes the videos that the pairs take, and previews those of few candidates.
    whole = ("all", None)
    rendered_all = all((one.render.strategy, one.render.preview) == whole for one in (stored, recipe))
    if not sections <= _PAIRING | {recipe.learns} or stored.learns not in (None, recipe.learns):
        return False
    return rendered_all or not sections & _PAIRING


def _how_to_learn_anew(run: RunDir, stored: Recipe, recipe: Recipe, changed: list[str]) -> str:
    if not _differs_in_learning(stored, recipe, changed):
        return ""
    what = "groups" if recipe.learns == "rl" else "pairs"
    return (
        f". They only say how {what} are chosen and learnt: delete {run.at(f'checkpoints/{recipe.learns}')}, "
        f"which was trained in the old way, and {run.at('rounds')} where it is there, and the same run goes "
        "on in the new one"
    )


def _trained(run: RunDir, recipe: Recipe) -> bool:
    return run.exists(f"checkpoints/{recipe.learns}/vpo.json")


def _sampled(run: RunDir) -> bool:
    """Whether there is a policy after SFT, or a candidate, which are known by how SFT learns."""
    return run.exists("checkpoints/sft/vpo.json") or is_sampled(run)


@contextmanager
def opened(recipe: Recipe, shard: Shard | None = None) -> Iterator[RunDir]:
    """`open_run`, and no other driver writes to the run directory, or to the shard, meanwhile; see
    `run_lock`.

    Raises:
        OtherRecipeError: see `open_run`.
        RunInUseError, RunLostError: see `run_lock.driving`.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)  # the lock is given back
    with driving(recipe.out, shard):
        yield open_run(recipe, shard)


@contextmanager
def accounted(recipe: Recipe, run: RunDir) -> Iterator[None]:
    """Write the ledger of what was made when the work within does not come to its end, whatever the
    reason. What ended it is what goes on: a ledger that cannot be written is a line in the log."""
    try:
        with working(run):
            yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            logger.warning("stopping: what was made is kept, and %s/ledger.json counts it", run.uri)
        try:
            write_ledger(recipe, run)
        except Exception as failure:
            trace = None if isinstance(failure, StorageError) else failure
            logger.warning("%s/ledger.json could not be written: %s", run.uri, failure, exc_info=trace)
        raise


def write_ledger(recipe: Recipe, run: RunDir, last_run: dict[str, Any] | None = None) -> list[str]:
    """Write `ledger.json`; returns what does not add up (yet, where stages are still to run).

    Args:
        last_run: what a whole run did that has come to its end. Without it, the ledger's own stays.
    """
    ledger = build_ledger(run, recipe)
    if last_run is None and run.exists("ledger.json"):
        with suppress(DamagedError):  # it is made anew
            last_run = run.read_json("ledger.json").get("last_run")
    if last_run:
        ledger["last_run"] = last_run
    problems = reconcile(ledger)
    check(run)
    run.write_json("ledger.json", ledger)
    return problems
