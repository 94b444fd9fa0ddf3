"""Rounds: `vpo run --rounds N`. The policy of one round samples the pairs of the next.

Round 1 is the run directory itself, round n is `rounds/<n>` in it and is a run directory like
any other; its `round.json` says which policy it starts from. Queries, videos, kept answers and the
account of what was paid are shared by all rounds. Every round finds out what is done, so the same
command goes on where it stopped, and a greater N adds rounds.

With `overlap: true` in the `dpo` or `rl` section, the candidates of a later round come from the policy that
the round before started from, and are sampled, judged, rendered and scored while that round trains.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

from vpo_ray.files.folder import join
from vpo_ray.loop.alongside import alongside
from vpo_ray.loop.curation import take_curated
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.phases import Report, generate_feedback, run_loop, starting_policy
from vpo_ray.loop.policies import LoopError, Start, learnt_id
from vpo_ray.recipe import Recipe
from vpo_ray.records import content_id
from vpo_ray.storage.run_dir import CURATED, ROUND, RunDir
from vpo_ray.storage.run_lock import driving
from vpo_ray.stream.placement import PlacementError

logger = logging.getLogger(__name__)


def run_rounds(
    recipe: Recipe, rounds: int, retry_errors: bool = False, report: Report | None = None
) -> RunDir:
    """Run the loop `rounds` times; returns the last round's run directory.

    DPO, or RL, of a later round starts from the policy of the round before. Its reference is that policy
    too, or with `reference: kept` the one that the first round started from. `report` is called for
    every round's directory; see `run_loop`.

    Raises:
        LoopError: rounds need a dpo or rl section that leaves a whole model.
        RunInUseError, RunLostError: see `run_lock.driving`.
    """
    if rounds > 1:
        _check(recipe)
    with driving(recipe.out):
        return _Rounds(recipe, rounds, retry_errors, report).run_all()


class _Rounds:
    def __init__(self, recipe: Recipe, rounds: int, retry_errors: bool, report: Report | None) -> None:
        self.recipe, self.rounds, self.retry_errors, self.report = recipe, rounds, retry_errors, report
        self.first = RunDir(recipe.out)
        learning = recipe.learning
        self.keeps = rounds > 1 and learning is not None and learning.reference == "kept"
        self.overlaps = learning is not None and learning.overlap

    def run_all(self) -> RunDir:
        run = self._loop(self.recipe, 1)
        for number in range(2, self.rounds + 1):
            before = starting_policy(self.recipe, run)
            with accounted(self.recipe, self.first), self._opened(number, run, before) as run:
                logger.info("round %d of %d", number, self.rounds)
                self._loop(self._recipe_of(number), number)
            # What the round paid is in the first round's account.
            write_ledger(self.recipe, self.first)
        return run

    def _loop(self, recipe: Recipe, number: int) -> RunDir:
        last = number == self.rounds
        beside = {} if last or not self.overlaps else {"beside": partial(self._next_beside, number)}
        return run_loop(recipe, self.retry_errors, last, self.report, **beside)

    def _recipe_of(self, number: int) -> Recipe:
        store = self.recipe.render.store or self.first.at("videos")
        return self.recipe.model_copy(
            update={
                "out": join(self.first.uri, f"rounds/{number}"),
                "render": self.recipe.render.model_copy(update={"store": store}),
            }
        )

    @contextmanager
    def _opened(self, number: int, before: RunDir, start_before: Start) -> Iterator[RunDir]:
        """The directory of a later round, with its queries.

        Args:
            before: the round before, with what it learns from.
            start_before: the policy that it starts from.
        """
        start = self._start(number, before, start_before)
        with opened(self._recipe_of(number)) as run:
            run.write_json(ROUND, {"round": number, "of": self.first.uri, "start": _facts(start)})
            if not run.exists(CURATED):
                take_curated(run, self.first)
            yield run

    def _start(self, number: int, before: RunDir, start_before: Start) -> Start:
        reference = starting_policy(self.recipe, self.first).policy if self.keeps else None
        start = Start(
            before.at(f"checkpoints/{self.recipe.learns}"),
            learnt_id(self.recipe, before, start_before),
            reference,
        )
        if not self.overlaps:
            return start
        # Round 2 samples the policy that round 1 did: other candidates of it.
        identity = content_id("sampled", start_before.identity, number, digits=16)
        return replace(start, sampler=start_before.policy, sampler_identity=identity)

    @contextmanager
    def _next_beside(self, number: int, run: RunDir, start: Start) -> Iterator[None]:
        """The next round's feedback is made while this round's policy is trained."""
        if run.exists(f"checkpoints/{self.recipe.learns}/vpo.json"):
            yield
            return
        with self._opened(number + 1, run, start) as following, alongside(partial(self._generate, following)):
            yield

    def _generate(self, run: RunDir, stop: threading.Event) -> None:
        recipe = self._recipe_of(run.round_number())
        logger.info("round %d is sampled and rendered beside the training", run.round_number())
        try:
            generate_feedback(recipe, run, starting_policy(recipe, run), None, self.retry_errors, stop)
        except PlacementError as error:
            logger.warning(
                "there is no room beside the training, so round %d waits for its end: %s",
                run.round_number(),
                error,
            )


def _facts(start: Start) -> dict[str, str | None]:
    """A start as `round.json` has it."""
    given = asdict(start)
    return {
        name: value for name, value in given.items() if value is not None or not name.startswith("sampler")
    }


def _check(recipe: Recipe) -> None:
    if recipe.learning is None:
        raise LoopError("--rounds needs a dpo or rl section: its policy samples the next round")
    if recipe.learning.lora is not None and not recipe.learning.lora.merge:
        raise LoopError(
            f"--rounds needs {recipe.learns}.lora.merge true: the next round samples from a whole model"
        )
