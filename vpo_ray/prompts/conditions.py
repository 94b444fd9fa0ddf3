"""What is asked of a prompt beyond the query: a language, a length, words that stay or stay away, JSON.

The policy is told in one wording, which `conditioned` adds to the query, wherever it is asked: when
candidates are sampled, in every example that it learns from, and by the endpoint for the wishes of a request.
Whether a prompt meets them is counted, not judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from unicodedata import normalize

from vpo_ray.keywords import KeywordList
from vpo_ray.prompts.answers import Schema, object_schema, schema_fault, string_schema

# Fields of a caption in JSON, where a recipe names none.
CAPTION_FIELDS = ("subject", "scene", "motion", "camera", "style")
HEADING = "Conditions of the prompt; they come before what is said elsewhere of language, length and form:"

# By the codes of `scripts.LANGUAGES`.
LANGUAGE_NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian",
    "it": "Italian", "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "ko": "Korean", "mk": "Macedonian",
    "mr": "Marathi", "ms": "Malay", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Conditions:
    """
    Args:
        language: whose script the prompt is written in, a code of LANGUAGE_NAMES.
        max_words: the most words of the prompt; characters of a script without spaces count as words.
        keep: texts that the prompt has in it, in any case.
        avoid: words and phrases that the prompt does not have, as a list of the safety gate has them.
        fields: the prompt is one JSON object with a text for each of these; its texts are what the other
            conditions are about.
    """

    language: str | None = None
    max_words: int | None = None
    keep: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != NONE

    @classmethod
    def stored(cls, text: str | None) -> Conditions:
        """The conditions of a row's column `conditions`, which `dump` wrote."""
        if text is None:
            return NONE
        values: dict[str, Any] = json.loads(text)
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)

    def dump(self) -> str | None:
        """As JSON for a row's column; None where there is none."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return json.dumps(given, ensure_ascii=False, sort_keys=True) if given else None

    def lines(self) -> list[str]:
        """What the policy is told, a sentence each."""
        found = []
        if self.language is not None:
            found.append(f"Write it in {LANGUAGE_NAMES[self.language]}.")
        if self.max_words is not None:
            found.append(f"Write at most {self.max_words} word{'s'[: self.max_words > 1]}.")
        if self.keep:
            found.append(f"Have in it, as they are: {_listed(self.keep)}.")
        if self.avoid:
            found.append(f"Do not have in it: {_listed(self.avoid)}.")
        if self.fields:
            found.append(f"Write one JSON object and nothing else, with the texts {_listed(self.fields)}.")
        return found

    def text(self) -> str:
        """What the policy is told, as a list under a heading."""
        return "\n".join([HEADING, *(f"- {line}" for line in self.lines())])

    def unmet(self, prompt: str) -> list[str]:
        """What a prompt does not meet, such as `keep: red` or `max_words: 61`."""
        from vpo_ray.prompts.scripts import in_script_of
        from vpo_ray.prompts.words import word_count

        said, found = prompt, []
        if self.fields:
            values, fault = _caption(prompt, self.fields)
            if fault is not None:
                found.append(f"format: {fault}")
            said = "\n".join(values.values()) if values else prompt
        text = _plain(said)
        found += [f"keep: {term}" for term in self.keep if _plain(term) not in text]
        found += [f"avoid: {term}" for term in self.avoid if KeywordList([term]).find(said) is not None]
        if self.language is not None and not in_script_of(self.language, said):
            found.append(f"language: {self.language}")
        count = word_count(said)
        if self.max_words is not None and count > self.max_words:
            found.append(f"max_words: {count}")
        return found

    def schema(self, max_chars: int | None = None) -> Schema | None:
        """The JSON schema of the prompt, whose texts have at most so many characters together; None where it
        is no JSON."""
        if not self.fields:
            return None
        if max_chars is None:
            return _schema(self.fields)
        most = max(1, max_chars // len(self.fields))
        return object_schema({name: string_schema(most) for name in self.fields})

    def shaped(self, prompt: str) -> str:
        """A prompt in the one form in which it is learnt, judged and rendered: JSON on one line, its keys in
        the order of the fields. Any other text, and JSON of another kind, is as it was."""
        values, fault = _caption(prompt, self.fields) if self.fields else ({}, "no JSON is asked for")
        if fault is not None:
            return prompt
        return json.dumps({name: values[name] for name in self.fields}, ensure_ascii=False)


NONE = Conditions()


def conditioned(query: str, conditions: Conditions) -> str:
    """The message that asks for a prompt under conditions; without any it is the query."""
    return f"{query}\n\n{conditions.text()}" if conditions else query


def asked_of(row: Mapping[str, Any]) -> str:
    """The message that asked for the prompts of a row of any table with a `query`."""
    return conditioned(row["query"], Conditions.stored(row.get("conditions")))


def kinds(unmet: Sequence[str]) -> str:
    """What is unmet in short, for counting: `keep, max_words`."""
    return ", ".join(dict.fromkeys(entry.partition(":")[0] for entry in unmet))


def _schema(names: Sequence[str]) -> Schema:
    return object_schema({name: {"type": "string"} for name in names})


def _caption(prompt: str, names: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """The texts of a caption by field, on one line each, and why it is no such caption."""
    if schema_fault(prompt, _schema(names)) is not None:
        return {}, "no JSON object with its texts alone"
    values = {name: " ".join(text.split()) for name, text in json.loads(prompt, strict=False).items()}
    empty = [name for name in names if not values[name]]
    return values, f"no text in {', '.join(empty)}" if empty else None


def _listed(texts: Sequence[str]) -> str:
    """Texts in quotation marks. They may be a caller's: nothing in one can end its quotation or a line."""
    return ", ".join(json.dumps(" ".join(text.split()), ensure_ascii=False) for text in texts)


def _plain(text: str) -> str:
    return " ".join(normalize("NFKC", text).casefold().split())
