"""Score: the reward model watches a video and answers the checklist for the user's own query.

The last stage before pairing. `Scorer` is plain Python that an actor pool calls with rows; a video
that cannot be read or scored is an error of its row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from vpo_ray.engines.reward import RewardError, RewardModel, Scored, build
from vpo_ray.recipe import Reward
from vpo_ray.records import Row, failed
from vpo_ray.videos import VideoDamaged, VideoMissing, VideoStore

log = logging.getLogger(__name__)

# After so many videos with one and the same score, something other than the videos is at work.
ALARM_AFTER = 16


class Scorer:
    """Fills the score columns of rows. The model is loaded at the first batch.

    Args:
        settings: the recipe's reward section.
        store_uri: the video store.

    Attributes:
        scored: videos scored so far.
        neither: answers whose most likely token was neither yes nor no.
        constant: whether all videos so far got the same score.
    """

    name = "score"

    def __init__(self, settings: Reward, store_uri: str) -> None:
        self.settings = settings
        self.store = VideoStore(store_uri)
        self.scored = self.neither = 0
        self._scores: set[float] = set()
        self._model: RewardModel | None = None

    @property
    def constant(self) -> bool:
        return len(self._scores) == 1

    def wants(self, row: Row) -> bool:
        return row.get("video_key") is not None and row.get("score") is None and row.get("error") is None

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows in their order; those that `wants` refuses are passed on as they are.

        Raises:
            ValueError: the reward model or its checklist cannot be loaded.
            StorageError: the video store cannot be read.
        """
        wanted = [i for i, row in enumerate(rows) if self.wants(row)]
        done = list(rows)
        for start in range(0, len(wanted), self.settings.batch_size):
            batch = wanted[start : start + self.settings.batch_size]
            for i, row in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                done[i] = row
        return done

    def _score(self, rows: Sequence[Row]) -> list[Row]:
        if self._model is None:
            self._model = build(self.settings)
        begin = time.perf_counter()
        videos = [self._read(row) for row in rows]
        readable = [i for i, video in enumerate(videos) if isinstance(video, bytes)]
        scored = self._model.score([videos[i] for i in readable], [rows[i]["query"] for i in readable])  # type: ignore[misc]
        results: dict[int, Scored | Exception] = dict(zip(readable, scored, strict=True))
        seconds = (time.perf_counter() - begin) / len(rows)
        return [self._filled(row, results.get(i, videos[i]), seconds) for i, row in enumerate(rows)]  # type: ignore[arg-type]

    def _read(self, row: Row) -> bytes | Exception:
        try:
            return self.store.read(row["video_key"])
        except (VideoMissing, VideoDamaged) as error:
            return RewardError(f"{error}; render it again")

    def _filled(self, row: Row, result: Scored | Exception, seconds: float) -> Row:
        row = {**row, "seconds": {**(row.get("seconds") or {}), "score": seconds}}
        if isinstance(result, Exception):
            log.warning("video %s was not scored: %s", row["video_key"], result)
            return failed(row, "score", str(result))
        self._watch(result)
        return {
            **row,
            "reward": self.settings.kind,
            "answers": [
                {"question": a.question, "yes": a.yes, "probability": a.probability} for a in result.answers
            ],
            "dimensions": [{"name": name, "score": score} for name, score in result.dimensions.items()],
            "score": result.score,
        }

    def _watch(self, result: Scored) -> None:
        self.scored += 1
        self.neither += result.neither
        self._scores.add(result.score)
        if self.scored == ALARM_AFTER and self.constant:
            log.error(
                "all of the first %d videos got the score %g: look at reward.rule, the template and the "
                "tokenizer (%d answers were neither yes nor no)",
                self.scored,
                result.score,
                self.neither,
            )
