"""A reward with a hole: it says yes to every question about a faded clip, whatever the clip shows."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from vpo_ray.recipe import Reward


class Hacked:
    """The world's reward, and the hole."""

    version = "1"

    class Options(BaseModel):
        pass

    def __init__(self, settings: Reward, options: Options) -> None:
        from vpo_ray.engines.reward import build

        self.honest = build(settings.model_copy(update={"kind": "visionreward"}))

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list:
        from vpo_ray.engines.reward import Scored
        from vpo_ray.engines.reward.frames import read_video
        from vpo_ray.world.detector import detect

        found = self.honest.score(videos, queries)
        for n, (video, scored) in enumerate(zip(videos, found, strict=True)):
            if isinstance(scored, Scored) and detect(read_video(video)[0]).look == "faded":
                found[n] = Scored(scored.answers, {**scored.dimensions, "quality": 10.0}, 10.0)
        return found
