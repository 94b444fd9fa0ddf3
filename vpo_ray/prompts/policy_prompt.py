"""The policy's prompt: one place that turns a user's query into the tokens the policy sees.

The task prompt is folded into the checkpoint's chat template, so that sampling, training and serving cannot
disagree: each applies the tokenizer's own template to one user message. User text is data: control tokens in
it are broken up before it reaches the template.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from vpo_ray.files.text_files import TextFileError, read_text
from vpo_ray.prompts.template_arguments import literal

SLOT = "{query}"
_MARK = "{#- vpo_ray: the task prompt is part of this template -#}"
# A server may pass content as a list of parts.
_FLATTENED = (
    "{%- if vpo_query is not string -%}{%- set vpo_query = vpo_query | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join('\n') -%}{%- endif -%}"
)


class PromptError(ValueError):
    """A prompt file or chat template that cannot be used."""


@cache
def read_prompt(name: str) -> str:
    """Text of `builtin:NAME` (the package's own wording) or of a file; see `text_files`.

    Raises:
        PromptError: no such prompt.
    """
    builtin = name.removeprefix("builtin:")
    source = name if builtin == name else Path(__file__).parent / f"{builtin}.txt"
    try:
        return read_text(source).strip("\n")
    except TextFileError as error:
        known = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.txt")))
        raise PromptError(
            f"cannot read the prompt {name!r}: {error.reason}. Built in are: {known}"
        ) from error


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every string that this tokenizer turns into one control token, longest first.

    Added tokens that a tokenizer does not call special are included: `<think>` and `<tool_call>` of Qwen and
    GLM steer a model as well. White space and single characters are not. For a token with white space around
    it, its inside counts too, since the white space may already precede the text.
    """
    added = tokenizer.added_tokens_decoder.values()
    tokens = {t.content for t in added} | set(tokenizer.all_special_tokens)
    tokens |= {token.strip() for token in tokens}
    return tuple(sorted((t for t in tokens if len(t.strip()) > 1), key=lambda t: (-len(t), t)))


def neutralise(text: str, tokens: Sequence[str]) -> str:
    """Break up control tokens in user text, so that it can never become one or open a chat turn.

    A space is inserted after the first character of every occurrence. Where that creates another token of the
    list, a character that no token has is used instead, so that the result never contains a token. Text
    without a token is returned unchanged. Takes time linear in the text and in the list.
    """
    starts = _starts(text, tokens)
    if not starts:
        return text
    used = set().union(*tokens)
    safe = next(c for c in chain("_-.", map(chr, range(ord("0"), sys.maxunicode))) if c not in used)
    broken = _broken(text, starts, tokens, " ")
    return _broken(text, starts, tokens, safe) if _starts(broken, tokens) else broken


def _starts(text: str, tokens: Sequence[str]) -> list[int]:
    """Start positions of tokens in a text, in order, overlapping ones included."""
    found: set[int] = set()
    for token in tokens:
        start = text.find(token) if token else -1
        while start >= 0:
            found.add(start)
            start = text.find(token, start + 1)
    return sorted(found)


def _broken(text: str, starts: list[int], tokens: Sequence[str], separator: str) -> str:
    """The text with a separator after the first character of each start; a token of one character, which
    cannot be broken up, becomes the separator."""
    single = {token for token in tokens if len(token) == 1}
    cuts = [0, *(start + 1 for start in starts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(cuts)]
    pieces[:-1] = [piece[:-1] if piece[-1] in single else piece for piece in pieces[:-1]]
    return separator.join(pieces)


def fold_task_prompt(chat_template: str, task_prompt: str) -> str:
    """A chat template that puts the last user message into the task prompt and ignores the rest.

    Args:
        chat_template: the base model's Jinja template.
        task_prompt: text with exactly one `{query}` slot.

    Raises:
        PromptError: another number of slots, or a template that already has a task prompt.
    """
    if task_prompt.count(SLOT) != 1:
        raise PromptError(
            f"a task prompt has exactly one {SLOT} slot, this one has {task_prompt.count(SLOT)}"
        )
    if is_folded(chat_template):
        raise PromptError("this checkpoint's chat template already holds a task prompt")
    return _head(task_prompt, _FLATTENED) + chat_template


def own_template(chat_template: str, task_prompt: str) -> str | None:
    """The model's own template inside one with this task prompt; None if it has another."""
    for flattened in (_FLATTENED, ""):  # without, as in earlier versions
        head = _head(task_prompt, flattened)
        if chat_template.startswith(head):
            return chat_template.removeprefix(head)
    return None


def _head(task_prompt: str, flattened: str) -> str:
    before, after = map(literal, task_prompt.split(SLOT))
    return (
        f"{_MARK}"
        "{%- set vpo_query = (messages | selectattr('role', 'equalto', 'user') | list | last).content -%}"
        f"{flattened}"
        f"{{%- set messages = [{{'role': 'user', 'content': {before} ~ vpo_query ~ {after}}}] -%}}"
    )


def is_folded(chat_template: Any) -> bool:
    return isinstance(chat_template, str) and chat_template.startswith(_MARK)


def prompt_ids(tokenizer: Any, query: str, before: str = "") -> list[int]:
    """Token ids of the policy's prompt for a query, up to where the answer begins.

    Args:
        before: see `chat_ids`.

    Raises:
        PromptError: the tokenizer's chat template holds no task prompt.
    """
    if not is_folded(tokenizer.chat_template):
        raise PromptError("the tokenizer's chat template holds no task prompt: load it with load_tokenizer()")
    return chat_ids(tokenizer, [{"role": "user", "content": query}], before)


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], before: str = "") -> list[int]:
    """Token ids of a conversation up to where the answer begins; control tokens in its texts are
    broken up, so that only the template opens turns.

    Args:
        before: what stands before the last user's text, such as an image: see `image_places`.

    Raises:
        PromptError: the template leaves out or changes what the last user message says.
    """
    tokens = control_tokens(tokenizer)
    safe = [{**message, "content": neutralise(message["content"], tokens)} for message in messages]
    users = [message for message in safe if message["role"] == "user"]
    asked = users[-1] if users else {"content": ""}
    asked["content"] = before + asked["content"]
    text = tokenizer.apply_chat_template(safe, add_generation_prompt=True, tokenize=False)
    if asked["content"].strip() not in text:
        raise PromptError("the chat template leaves out or changes a part of this text")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
