"""Recipe sections of serving."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vpo_ray.recipe.base import Pool, Positive, Section, Temperature
from vpo_ray.recipe.text import Engine


class Serve(Section):
    """The endpoint of the trained policy."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    model_name: str = "vpo"
    temperature: Temperature = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024
    max_query_chars: Positive = 4000
    max_n: Positive = 8
    engine: Engine = Engine()
    pool: Pool = Pool()
