"""Which queries have which profile, and what it asks of their prompts. Pure functions of content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vpo_ray.prompts.conditions import Conditions, kinds
from vpo_ray.recipe import Profile
from vpo_ray.records import Row, share_of

# Words of a query that may be kept have so many letters.
LEAST_LETTERS = 4


def profiled(query: Row, profiles: Mapping[str, Profile], seed: int) -> Row:
    """The columns `profile` and `conditions` of a query's rows; none where it has no profile.

    Args:
        query: a row with `query_id` and `query`.
        seed: the recipe's.
    """
    place = share_of("profile", seed, query["query_id"]) if profiles else 1.0
    for name in sorted(profiles):
        if place < profiles[name].share:
            return under(name, query["query"], profiles, seed)
        place -= profiles[name].share
    return {}


def under(
    name: str, query: str, profiles: Mapping[str, Profile], seed: int, prompt: str | None = None
) -> Row:
    """The columns of a query that has this profile.

    Args:
        prompt: one that is given as an example of it; words that it keeps are what is asked.
    """
    profile = profiles[name]
    words = kept_words(query, profile.keep_words, seed, prompt)
    return {"profile": name, "conditions": profile.conditions(words).dump()}


def asked_alone(profiles: Mapping[str, Profile], name: str | None) -> dict[str, Profile]:
    """A profile for every query; none without a name."""
    return {} if name is None else {name: profiles[name].model_copy(update={"share": 1.0})}


def kept_words(query: str, count: int, seed: int, within: str | None = None) -> tuple[str, ...]:
    """At most so many words of a query, chosen by content, in their order; see LEAST_LETTERS.

    Args:
        within: a prompt, of whose words they are.
    """
    edges = "".join({character for character in query if not character.isalnum()})
    words = dict.fromkeys(part.strip(edges) for part in query.split())
    long = [word for word in words if len(word) >= LEAST_LETTERS and word.isalpha()]
    if within is not None:
        long = [word for word in long if not Conditions(keep=(word,)).unmet(within)]
    chosen = sorted(long, key=lambda word: share_of("keep", seed, query, word))[:count]
    return tuple(word for word in long if word in chosen)


class ProfileCount:
    """Counts prompts by profile, and what of it they do not meet."""

    columns = ("profile", "unmet")

    def __init__(self) -> None:
        self.prompts: Counter[str] = Counter()
        self.unmet: dict[str, Counter[str]] = {}

    def add(self, row: Row) -> None:
        if row["profile"] is None:
            return
        self.prompts[row["profile"]] += 1
        found = self.unmet.setdefault(row["profile"], Counter())
        if row["unmet"]:
            found["any"] += 1
            found.update(kinds(row["unmet"]).split(", "))

    def result(self) -> dict[str, Any]:
        """By profile the prompts, and how many of them miss each of its conditions, and any; nothing where
        no query has a profile."""
        entries = {
            name: {"prompts": count, "unmet": dict(sorted(self.unmet[name].items()))}
            for name, count in sorted(self.prompts.items())
        }
        return {"profiles": entries} if entries else {}
