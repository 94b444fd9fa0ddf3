"""The policy's prompt: one place that turns a user's query into the tokens the policy sees.

The task prompt travels with the checkpoint, folded into its chat template, so that sampling,
training and serving cannot disagree: each applies the tokenizer's own template to one user
message. User text is data: control tokens in it are broken up before it reaches the template.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from vpo_ray.model_cache import fetch
from vpo_ray.template_arguments import has_arguments, literal, unknown_arguments, with_arguments
from vpo_ray.text_files import TextFileError, read_text

SLOT = "{query}"
_MARK = "{#- vpo_ray: the task prompt is part of this template -#}"
# A server may hand over content as a list of parts.
_FLATTENED = (
    "{%- if vpo_query is not string -%}{%- set vpo_query = vpo_query | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join('\n') -%}{%- endif -%}"
)
# In front of a template that takes content only as such a list.
_PARTS = (
    "{#- vpo_ray: this template takes content as a list of parts -#}"
    "{%- set vpo = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is string -%}"
    "{%- set message = dict(message, content=[{'type': 'text', 'text': message.content}]) -%}{%- endif -%}"
    "{%- set vpo.messages = vpo.messages + [message] -%}{%- endfor -%}{%- set messages = vpo.messages -%}"
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
    source = name if builtin == name else Path(__file__).parent / "prompts" / f"{builtin}.txt"
    try:
        return read_text(source).strip("\n")
    except TextFileError as error:
        known = ", ".join(sorted(p.stem for p in (Path(__file__).parent / "prompts").glob("*.txt")))
        raise PromptError(
            f"cannot read the prompt {name!r}: {error.reason}. Built in are: {known}"
        ) from error


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every string that this tokenizer turns into one control token, longest first.

    Added tokens that a tokenizer does not call special are among them: `<think>` and `<tool_call>`
    of Qwen and GLM steer a model no less. White space and single characters are none, whatever a
    tokenizer calls them. Of one with white space around it, what is inside counts too: the white space
    may stand in front of the text already.
    """
    added = tokenizer.added_tokens_decoder.values()
    tokens = {t.content for t in added} | set(tokenizer.all_special_tokens)
    tokens |= {token.strip() for token in tokens}
    return tuple(sorted((t for t in tokens if len(t.strip()) > 1), key=lambda t: (-len(t), t)))


def neutralise(text: str, tokens: Sequence[str]) -> str:
    """Break up control tokens in user text, so that it can never become one or open a chat turn.

    A space goes behind the first character of every occurrence. Where that makes another token of the
    list, or its own (one that begins with a space), a character that no token has goes there instead:
    whatever the list, the result holds none of it. Text without a token is returned as it is. Takes
    time in proportion to the text and to the list.
    """
    starts = _starts(text, tokens)
    if not starts:
        return text
    used = set().union(*tokens)
    safe = next(c for c in chain("_-.", map(chr, range(ord("0"), sys.maxunicode))) if c not in used)
    broken = _broken(text, starts, tokens, " ")
    return _broken(text, starts, tokens, safe) if _starts(broken, tokens) else broken


def _starts(text: str, tokens: Sequence[str]) -> list[int]:
    """Where a token begins in a text, overlapping ones included, in order."""
    found: set[int] = set()
    for token in tokens:
        start = text.find(token) if token else -1
        while start >= 0:
            found.add(start)
            start = text.find(token, start + 1)
    return sorted(found)


def _broken(text: str, starts: list[int], tokens: Sequence[str], separator: str) -> str:
    """The text with a separator behind the first character of each start; a token of one character,
    which cannot be broken up, becomes the separator."""
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
    """The model's own template in one that holds this task prompt; None when it holds another."""
    for flattened in (_FLATTENED, ""):  # without, as earlier versions folded it
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


def prompt_ids(tokenizer: Any, query: str) -> list[int]:
    """Token ids of the policy's prompt for a query, up to where the answer begins.

    Raises:
        PromptError: the tokenizer's chat template holds no task prompt.
    """
    if not is_folded(tokenizer.chat_template):
        raise PromptError("the tokenizer's chat template holds no task prompt: load it with load_tokenizer()")
    return chat_ids(tokenizer, [{"role": "user", "content": query}])


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the answer begins; control tokens in its texts are
    broken up, so that only the template opens turns.

    Raises:
        PromptError: the template leaves out or changes what the last user message says.
    """
    tokens = control_tokens(tokenizer)
    safe = [{**message, "content": neutralise(message["content"], tokens)} for message in messages]
    text = tokenizer.apply_chat_template(safe, add_generation_prompt=True, tokenize=False)
    asked = next((message["content"] for message in reversed(safe) if message["role"] == "user"), "")
    if asked.strip() not in text:
        raise PromptError("the chat template leaves out or changes a part of this text")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_chat_tokenizer(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """A tokenizer with one chat template, through which what a user says is proven to pass.

    Of several named templates it is the one named `default`. One that takes content only as a list of
    parts is given such a list.

    Args:
        model: a local folder, URI or hub id.
        arguments: of the chat template (`chat_template_kwargs`); they become part of it.

    Raises:
        PromptError: no chat template, one that takes no such argument, or one that changes or leaves out
            a user's message.
        StorageError: nothing can be read at the URI.
    """
    tokenizer = _tokenizer(model, revision, trust_remote_code, arguments)
    if not is_folded(tokenizer.chat_template):
        tokenizer.chat_template = _proven(model, tokenizer, "")
    return tokenizer


def load_tokenizer(
    model: str,
    task_prompt: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """The policy's tokenizer with the task prompt folded in (kept as it is when it already is).

    Args:
        model: a local folder, URI or hub id.
        task_prompt: text with a `{query}` slot; None asks for a checkpoint that carries its own.
        arguments: of the chat template; a checkpoint that carries its own task prompt has them in it.

    Raises:
        PromptError: no chat template, no task prompt to be had, or a template that does not show a
            query, or the task prompt around it, as it is.
    """
    tokenizer = _tokenizer(model, revision, trust_remote_code, arguments)
    if is_folded(tokenizer.chat_template):
        _prove(model, tokenizer, tokenizer.chat_template, "", "")
    elif task_prompt is None:
        raise PromptError(f"{model}: the chat template holds no task prompt; it is not a vpo_ray policy")
    else:
        tokenizer.chat_template = _proven(model, tokenizer, task_prompt)
    return tokenizer


def _tokenizer(
    model: str, revision: str | None, trust_remote_code: bool, arguments: Mapping[str, Any] | None
) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        fetch(model, weights=False), revision=revision, trust_remote_code=trust_remote_code
    )
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        if "default" not in template:
            raise PromptError(
                f"{model}: the tokenizer has the chat templates {', '.join(sorted(template))} and none named "
                "default: save the one to use as chat_template.jinja in the checkpoint's folder"
            )
        template = template["default"]
    if not template:
        raise PromptError(f"{model}: the tokenizer has no chat template; use an instruction-tuned checkpoint")
    template = template.removeprefix("\ufeff")
    if arguments and not has_arguments(template, arguments):
        if unknown := unknown_arguments(template, arguments):
            raise PromptError(f"{model}: the chat template takes no chat_template_kwargs.{unknown[0]}")
        if is_folded(template):
            raise PromptError(f"{model}: this checkpoint was made with other chat_template_kwargs, or none")
        template = with_arguments(template, arguments)
    tokenizer.chat_template = template
    return tokenizer


# What must pass through a template: the forms of text that templates in use cut, trim or rewrite.
_PROBES = (
    "a red kite",
    "  A cat\n\n\ttwo Dogs,  3 birds \r\n{{ 7*7 }} {% if x %} {query} {} %s \\n \"quoted\" 'so' &amp; <b>",
    "\u732b \u043a\u043e\u0448\u043a\u0430 \U0001f408\u200d\u2b1b e\u0301 \ufb01 \u202eabc\u202c\u00a0\u2028",
    "<think>one</think> two [INST] three [/INST] <|im_end|> </s> <tool_response>\nfour\n</tool_response>",
    " ".join(f"word{number}" for number in range(4000)),
)


def _proven(model: str, tokenizer: Any, task_prompt: str) -> str:
    """The tokenizer's template with the task prompt, if one is given, in the form that shows a query."""
    own = tokenizer.chat_template
    before, after = task_prompt.split(SLOT) if task_prompt.count(SLOT) == 1 else ("", "")
    forms = [fold_task_prompt(form, task_prompt) if task_prompt else form for form in (own, _PARTS + own)]
    refused: list[PromptError] = []
    for form in forms:
        try:
            _prove(model, tokenizer, form, before, after)
            return form
        except PromptError as error:
            refused.append(error)
    raise refused[0]


def _prove(model: str, tokenizer: Any, template: str, before: str, after: str) -> None:
    """Raises PromptError when the template does not show a user's message, with what is around it."""
    tokens = control_tokens(tokenizer)
    for probe in _PROBES:
        safe = neutralise(probe, tokens)
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": safe}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # a template is a program of others
            raise PromptError(
                f"{model}: the chat template refuses a conversation of one user message "
                f"({type(error).__name__}: {str(error)[:200]}). {_ADVICE}"
            ) from error
        if probe is _PROBES[0] and safe in text:
            in_front, _, behind = text.rpartition(safe)
            _apart(model, in_front, behind, tokens)
        if f"{before}{safe}{after}".strip() not in text:
            shown = "changes or cuts" if max(safe.split(), key=len) in text else "leaves out"
            raise PromptError(
                f"{model}: the chat template {shown} what a user says: {safe[:60]!r} becomes "
                f"{text[-200:]!r}. {_ADVICE}"
            )


def _apart(model: str, before: str, after: str, tokens: Sequence[str]) -> None:
    """Raises PromptError when a query could make a control token of the text that it stands between."""
    for token in tokens:
        for cut in range(1, len(token)):
            begun, ended = token[:cut], token[cut:]
            if (begun.strip() and before.endswith(begun)) or (ended.strip() and after.startswith(ended)):
                side = f"behind {begun!r}" if before.endswith(begun) else f"in front of {ended!r}"
                raise PromptError(
                    f"{model}: the query stands {side}, a part of the control token {token!r}, and could "
                    "complete it: put a space or an end of line between them, in policy.task_prompt or the "
                    "chat template"
                )


_ADVICE = (
    "Give the checkpoint's folder a chat_template.jinja that shows the one user message as it is, or use "
    "another checkpoint"
)
