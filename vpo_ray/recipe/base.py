"""What the sections of a recipe share: strictness, number types, actor pools."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


def _size(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


class Pool(Section):
    """An actor pool: how many replicas, what each reserves of the cluster, and the labels of nodes
    that it may run on (Ray's label selectors: `{region: us-west, tier: "!spot"}`)."""

    size: Annotated[tuple[Positive, Positive], BeforeValidator(_size)] = (1, 1)
    num_cpus: Amount = 1
    num_gpus: Amount = 0
    accelerator_type: str | None = None
    resources: dict[str, Amount] = {}
    labels: dict[str, str] = {}

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.size[0] > self.size[1]:
            raise ValueError(f"size {list(self.size)}: write [min, max] with min <= max, or one number")
        return self
