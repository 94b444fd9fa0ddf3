"""What the sections of a recipe share: strictness, number types, actor pools."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def require_keys(section: Section, names: str) -> None:
    """Raises pydantic's error for keys that are missing: those whose value is empty."""
    missing = [name for name in names.split() if not getattr(section, name)]
    if missing:
        lines: list[InitErrorDetails] = [{"type": "missing", "loc": (n,), "input": {}} for n in missing]
        raise ValidationError.from_exception_data(type(section).__name__, lines)


def refuse_unused(section: Section, names: str, why: str) -> None:
    """Refuse keys that would be ignored. One that says its default is let pass: a run's stored recipe names
    every key.

    Args:
        names: of keys of the section, with spaces between them.
        why: ends the message, such as "without cache".

    Raises:
        ValueError: one of them says anything but its default.
    """
    fields = type(section).model_fields
    given = [
        name
        for name in names.split()
        if getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]
    if given:
        raise ValueError(f"{' and '.join(given)} {'have' if given[1:] else 'has'} no effect {why}")


def _word(**words: str) -> BeforeValidator:
    """YAML reads `off`, `no` and `yes` without quotation marks as true or false."""
    known = {False: words.get("false"), True: words.get("true")}
    return BeforeValidator(lambda given: known[given] or given if isinstance(given, bool) else given)


# Of keys that take these as words: `off`; `no` and `yes`; `no`, which is Norwegian, too.
OFF, NO_OR_YES, NO = _word(false="off"), _word(false="no", true="yes"), _word(false="no")

Positive = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


# Where something is: a path, a URI or a hub id. `~` at the beginning of a path is the home of who reads
# the recipe. A Source is read by a run; a Place is written to, or is each node's own.
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
_SOURCE = "source"
Source = Annotated[str, AfterValidator(os.path.expanduser), _SOURCE]


# Both ways to write it, for editors.
_Size = Positive | tuple[Positive, Positive]


def _size(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


class Pool(Section):
    """An actor pool: how many replicas, what each reserves of the cluster, and the labels of nodes
    that it may run on (Ray's label selectors: `{region: us-west, tier: "!spot"}`)."""

    size: Annotated[tuple[Positive, Positive], BeforeValidator(_size, json_schema_input_type=_Size)] = (1, 1)
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


def locate(name: str) -> str:
    """The absolute path of a local folder or file, or the hub id or URI as it is."""
    path = Path(os.path.expanduser(name))
    return str(path.resolve()) if name and "://" not in name and path.exists() else name


def sources(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every path, URI and hub id in a section that a run reads, with its dotted key."""
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        if isinstance(value, Section):
            yield from sources(value, f"{key}.")
        elif isinstance(value, Mapping):
            for part, inner in value.items():
                if isinstance(inner, Section):
                    yield from sources(inner, f"{key}.{part}.")
        elif _SOURCE in field.metadata or _is_source(field.annotation):
            if isinstance(value, str):
                yield from [(key, value)] if value and value not in _words(field.annotation) else []
            elif isinstance(value, Sequence):
                yield from ((key, one) for one in value)


def _words(annotation: Any) -> Iterator[Any]:
    """The words that may stand in place of a path."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _words(part)


def _is_source(annotation: Any) -> bool:
    parts = (*get_args(annotation), *getattr(annotation, "__metadata__", ()))
    return any(part == _SOURCE if isinstance(part, str) else _is_source(part) for part in parts)
