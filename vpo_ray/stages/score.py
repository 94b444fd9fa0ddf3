"""Score: the reward model watches a video and answers the checklist for the user's own query.

The last stage before pairing. `Scorer` is plain Python that an actor pool calls with rows; a video
that cannot be read or scored is an error of its row. Further rewards (`more_rewards` of the recipe)
see the same bytes, decoded once, and fill columns of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.results import said_by
from vpo_ray.engines.reward import ImageReward, PromptReward, RewardError, RewardModel, Scored, build
from vpo_ray.engines.reward.results import checked_scores
from vpo_ray.engines.reward.shared_decoding import Pick, decoding_once
from vpo_ray.recipe import Recipe, Reward
from vpo_ray.recipe.plugins import PluginError, find_usable
from vpo_ray.records import Row, failed
from vpo_ray.stages.facts import Fact, of_file, of_model, of_plugin, of_versions
from vpo_ray.stages.spec import Making
from vpo_ray.stages.tally import Tally
from vpo_ray.storage.images import ImageStore
from vpo_ray.storage.videos import VideoDamaged, VideoMissing, VideoStore

log = logging.getLogger(__name__)

# After so many videos with one and the same score, something other than the videos is at work.
ALARM_AFTER = 16


class WatchedReward:
    """A reward model and what its scores so far look like.

    Attributes:
        label: what it is, for the rows: its kind, and of others' models also what their results depend on.
        scored: videos scored so far.
        neither: answers whose most likely token was neither yes nor no.
        constant: whether all videos so far got the same score.
    """

    def __init__(self, settings: Reward, name: str = "reward", account: Account | None = None) -> None:
        self.settings, self.name, self.account = settings, name, account
        self.label = settings.kind
        self.scored = self.neither = 0
        self._scores: set[float] = set()
        self._model: RewardModel | None = None

    @property
    def constant(self) -> bool:
        return len(self._scores) == 1

    def load(self) -> None:
        if self._model is None:
            self._model = build(self.settings, self.account)
            self.label = _label(self.settings)

    @property
    def pick(self) -> Pick | None:
        """Which frames it looks at, where it says so."""
        found: Pick | None = getattr(self._model, "pick", None)
        return found

    @property
    def by_uri(self) -> bool:
        """Whether it is given the videos' URIs in place of their bytes."""
        return getattr(self._model, "by_uri", False)

    def score(
        self,
        videos: Sequence[bytes | str],
        rows: Sequence[Row],
        images: Sequence[tuple[str, bytes] | None] = (),
    ) -> list[Scored | Exception]:
        """A result for each video, or for the prompt that it was made of where that is what is scored.

        Args:
            images: of the rows' queries, where any of them has one. A reward that does not see them is not
                given them.
        """
        assert self._model is not None, "load() comes first"
        queries = [row["query"] for row in rows]
        results: object
        if isinstance(self._model, PromptReward):
            results = self._model.score_prompts([row["prompt"] for row in rows], queries)
        elif any(images) and isinstance(self._model, ImageReward):
            results = self._model.score_with_images(videos, queries, images)
        else:
            results = self._model.score(videos, queries)
        for result in (
            found := checked_scores(results, len(rows), f"{self.name}: {type(self._model).__name__}")
        ):
            if isinstance(result, Scored):
                self._watch(result)
        return found

    def _watch(self, result: Scored) -> None:
        self.scored += 1
        self.neither += result.neither
        self._scores.add(result.score)
        if self.scored == ALARM_AFTER and self.constant:
            log.error(
                "all of the first %d videos got the score %g by %s: look at its rule, the template and the "
                "tokenizer (%d answers were neither yes nor no)",
                self.scored,
                result.score,
                self.name,
                self.neither,
            )


class Scorer:
    """Fills the score columns of rows.

    Args:
        settings: the recipe's reward section.
        store_uri: the video store.
        more: the recipe's `more_rewards`, by name. A video that one of them cannot score is an error
            of its row, as with the first.
        account: what rewards behind endpoints are paid from.
        images: URI of the images of queries, where they may have any.
    """

    name = "score"

    def __init__(
        self,
        settings: Reward,
        store_uri: str,
        more: Mapping[str, Reward] | None = None,
        account: Account | None = None,
        images: str | None = None,
    ) -> None:
        self.settings = settings
        self.images = None if images is None else ImageStore(images)
        self.store = VideoStore(store_uri)
        self.reward = WatchedReward(settings, account=account)
        self.more = [WatchedReward(reward, name, account) for name, reward in (more or {}).items()]
        self.warming: Callable[[], AbstractContextManager[None]] = nullcontext  # see actor_pools.Stage
        self._loaded = False

    def wants(self, row: Row) -> bool:
        return row.get("video_key") is not None and row.get("score") is None and row.get("error") is None

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows in their order; those that `wants` refuses are passed on as they are.

        Raises:
            ValueError: a reward model or its checklist cannot be loaded.
            StorageError: the video store cannot be read.
        """
        wanted = [i for i, row in enumerate(rows) if self.wants(row)]
        done = list(rows)
        if wanted and not self._loaded:
            with self.warming():
                for reward in (self.reward, *self.more):
                    reward.load()
            self._loaded = True
        for start in range(0, len(wanted), self.settings.batch_size):
            batch = wanted[start : start + self.settings.batch_size]
            for i, row in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                done[i] = row
        return done

    def _score(self, rows: Sequence[Row]) -> list[Row]:
        begin = time.perf_counter()
        videos = [self._read(row) for row in rows]
        done = {i: _failed(rows[i], video) for i, video in enumerate(videos) if isinstance(video, Exception)}
        images = [self._image(row) for row in rows]
        rewards = (self.reward, *self.more)
        with decoding_once([reward.pick for reward in rewards if reward.pick is not None]):
            for reward in rewards:
                left = [i for i in range(len(rows)) if i not in done or done[i]["error"] is None]
                given = [self.store.uri(rows[i]["video_key"]) if reward.by_uri else videos[i] for i in left]
                shown = [images[i] for i in left]
                results = reward.score(given, [rows[i] for i in left], shown)  # type: ignore[arg-type]
                for i, result in zip(left, results, strict=True):
                    done[i] = _filled(done.get(i, rows[i]), result, reward, first=reward is self.reward)
        seconds = (time.perf_counter() - begin) / len(rows)
        return [
            {**done[i], "seconds": {**(row.get("seconds") or {}), "score": seconds}}
            for i, row in enumerate(rows)
        ]

    def _image(self, row: Row) -> tuple[str, bytes] | None:
        """Raises StorageError: the image of a row is not there."""
        name = row.get("image")
        return None if name is None or self.images is None else (name, self.images.read(name))

    def _read(self, row: Row) -> bytes | Exception:
        try:
            return self.store.read(row["video_key"])
        except (VideoMissing, VideoDamaged) as error:
            return RewardError(f"{error}; --retry-errors renders it again")


def _filled(row: Row, result: Scored | Exception, reward: WatchedReward, first: bool) -> Row:
    if isinstance(result, Exception):
        return _failed(row, result if first else RewardError(f"{reward.name}: {said_by(result)}"))
    columns = _columns(result, reward.label)
    if first:
        return {**row, **columns, "error": None}
    return {**row, "more_rewards": [*(row.get("more_rewards") or []), {"name": reward.name, **columns}]}


def _failed(row: Row, error: Exception) -> Row:
    reason = said_by(error)
    log.warning("video %s was not scored: %s", row["video_key"], reason)
    # Half a set of scores would look like a whole one.
    empty: Row = dict.fromkeys(("reward", "answers", "dimensions", "score", "more_rewards"))
    return failed({**row, **empty}, "score", reason)


def _label(settings: Reward) -> str:
    plugin = find_usable(settings)
    if plugin is not None and hasattr(plugin.builder, "identity"):
        with suppress(PluginError):  # such as a hub that does not answer
            return plugin.identity(settings)
    return settings.kind


def _columns(result: Scored, label: str) -> dict[str, Any]:
    return {
        "reward": label,
        "answers": [
            {"question": a.question, "yes": a.yes, "probability": a.probability} for a in result.answers
        ],
        "dimensions": [{"name": name, "score": score} for name, score in result.dimensions.items()],
        "score": result.score,
    }


def make(making: Making) -> Callable[[], Scorer]:
    recipe = making.recipe
    more = {name: reward.located() for name, reward in recipe.more_rewards.items()}
    return partial(Scorer, recipe.reward.located(), making.store, more, making.account, making.images)


def facts(recipe: Recipe) -> Iterator[Fact]:
    rewards = {"reward": recipe.reward}
    rewards |= {f"more_rewards.{name}": reward for name, reward in recipe.more_rewards.items()}
    for where, reward in rewards.items():
        yield from of_plugin(where, reward)
        for name, path in reward.files().items():
            yield from of_file(f"{where}.{name}", path)
        if models := reward.models():
            yield from of_versions("torch", "transformers")
        for name, path in models.items():
            yield from of_model(f"{where}.{name}", path)
        if {"dynamic_degree", "motion_magnitude"}.intersection(reward.dimensions):
            yield from of_versions("opencv-python-headless")


class ScoreTally(Tally):
    columns = ("score",)

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self.low, self.high = float("inf"), float("-inf")

    def add(self, row: Row) -> None:
        score = row["score"]
        self.count, self.total = self.count + 1, self.total + score
        self.low, self.high = min(self.low, score), max(self.high, score)

    def result(self) -> dict[str, Any]:
        if not self.count:
            return {"score": None}
        return {"score": {"mean": self.total / self.count, "min": self.low, "max": self.high}}


tally = ScoreTally
