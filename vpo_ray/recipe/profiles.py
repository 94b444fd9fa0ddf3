"""Profiles: conditions under which a share of the queries is asked, so that the policy learns to meet them.

They are the wishes of a request (`serve.wishes`), in the same words: `prompts.conditions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from vpo_ray.prompts.conditions import CAPTION_FIELDS, LANGUAGE_NAMES, Conditions
from vpo_ray.recipe.base import NO, Positive, Section, refuse_unused


def known_language(code: str) -> str:
    if code not in LANGUAGE_NAMES:
        known = " ".join(sorted(LANGUAGE_NAMES))
        raise ValueError(f"no language whose script is known here: give one of {known}")
    return code


def _has_text(term: str) -> str:
    if not term.strip():
        raise ValueError("write a word: a term of white space alone is met by nothing")
    return term


def _field_names(names: list[str]) -> list[str]:
    if wrong := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"{wrong[0]!r} is no name of a field: use letters, digits and _")
    if len(set(names)) < len(names):
        raise ValueError("a field is named twice")
    return names


_CODES: dict[str, Any] = {"enum": sorted(LANGUAGE_NAMES)}
LanguageCode = Annotated[str, AfterValidator(known_language), Field(json_schema_extra=_CODES)]
ProfileTerms = Annotated[
    list[Annotated[str, AfterValidator(_has_text), Field(max_length=200)]], Field(max_length=16)
]
CaptionFields = Annotated[list[str], AfterValidator(_field_names), Field(min_length=1)]


class Profile(Section):
    """What is asked of the prompts of a share of the queries.

    Which queries have it follows from their ids and the recipe's seed. `keep_words` has some words of each
    query kept as they are, so that the policy learns what a request's `keep` asks.
    """

    share: Annotated[float, Field(gt=0, le=1, description="of the queries")]
    language: Annotated[LanguageCode, NO] | None = Field(
        default=None, description="a code such as zh; checked by its script"
    )
    max_words: Positive | None = Field(default=None, description="the most words of a prompt")
    keep: ProfileTerms = Field(default=[], description="texts that every prompt has in it, in any case")
    keep_words: Annotated[
        int, Field(ge=0, le=8, description="words of the query that its prompts keep, at most so many")
    ] = 0
    avoid: ProfileTerms = Field(default=[], description="words and phrases that no prompt has")
    format: Literal["text", "json"] = Field(
        default="text", description="json: a prompt is one JSON object with a text for each of `fields`"
    )
    fields: CaptionFields = Field(
        default=list(CAPTION_FIELDS), description="of format: json, in the order in which they are written"
    )

    @model_validator(mode="after")
    def _asks_something(self) -> Profile:
        if self.format == "text":
            refuse_unused(self, "fields", "with format: text")
        if not (self.conditions() or self.keep_words):
            raise ValueError("it asks nothing: give language, max_words, keep, keep_words, avoid or format")
        return self

    def conditions(self, words: tuple[str, ...] = ()) -> Conditions:
        """What is asked of a prompt, with the words of its query that are kept."""
        return Conditions(
            language=self.language,
            max_words=self.max_words,
            keep=tuple(dict.fromkeys([*self.keep, *words])),
            avoid=tuple(self.avoid),
            fields=tuple(self.fields) if self.format == "json" else (),
        )


def check_profiles(profiles: Mapping[str, Profile]) -> None:
    """Raises ValueError where the shares are more than all queries, or JSON has two sets of fields."""
    total = sum(profile.share for profile in profiles.values())
    if total > 1 + 1e-9:
        raise ValueError(f"profiles: the shares sum to {total:g}, more than all queries")
    if len({tuple(p.fields) for p in profiles.values() if p.format == "json"}) > 1:
        raise ValueError("profiles: those of format: json name different fields; a policy learns one set")


def check_evaluated(name: str, seeds: int, profiles: Mapping[str, Profile]) -> None:
    """Raises ValueError where an evaluation cannot ask under a profile."""
    if name not in profiles:
        known = ", ".join(profiles) or "none"
        raise ValueError(f"evaluate.profile: no profile {name!r}; profiles has {known}")
    if seeds > 1 and profiles[name].keep_words:
        raise ValueError("evaluate.seeds: 1 with a profile that has keep_words, which each seed chooses anew")


def caption_fields(profiles: Mapping[str, Profile]) -> list[str] | None:
    """The fields of the profiles' captions; None where none is in JSON."""
    return next((list(p.fields) for p in profiles.values() if p.format == "json"), None)
