"""Tokenizers of policies and judges, loaded with a check that user text survives the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vpo_ray.prompts.policy_prompt import (
    SLOT,
    PromptError,
    control_tokens,
    fold_task_prompt,
    is_folded,
    neutralise,
)
from vpo_ray.prompts.template_arguments import (
    has_arguments,
    literal,
    unknown_arguments,
    with_arguments,
)
from vpo_ray.storage.model_cache import fetch

# Prepended to a template that takes content only as a list of parts.
_PARTS = (
    "{#- vpo_ray: this template takes content as a list of parts -#}"
    "{%- set vpo = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is string -%}"
    "{%- set message = dict(message, content=[{'type': 'text', 'text': message.content}]) -%}{%- endif -%}"
    "{%- set vpo.messages = vpo.messages + [message] -%}{%- endfor -%}{%- set messages = vpo.messages -%}"
)


def load_chat_tokenizer(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """A tokenizer with one chat template, checked to pass user text unchanged.

    Of several named templates it is `default`. One that takes content only as a list of parts is given such
    a list, and one that does not open the answer's turn when it is asked to is completed.

    Args:
        model: a local folder, URI or hub id.
        arguments: of the chat template (`chat_template_kwargs`); they become part of it.

    Raises:
        PromptError: no chat template, one without such an argument, or one that changes or leaves out a
            user's message.
        StorageError: the URI cannot be read.
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
    """The policy's tokenizer with the task prompt folded in (unchanged if it already is).

    Args:
        model: a local folder, URI or hub id.
        task_prompt: text with a `{query}` slot; None requires a checkpoint that has its own.
        arguments: of the chat template; a checkpoint with its own task prompt includes them.

    Raises:
        PromptError: no chat template, no task prompt, or a template that changes the query or the task
            prompt around it.
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

    local = fetch(model, weights=False)
    tokenizer = AutoTokenizer.from_pretrained(local, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_other_tokens(model, tokenizer, local, revision)
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


def _refuse_other_tokens(model: str, tokenizer: Any, local: str, revision: str | None) -> None:
    """Raises PromptError where a tokenizer's class splits text otherwise than its `tokenizer.json`, which the
    model was trained on: some build their rules anew, whatever the file has (a Llama 3 that is called a
    LlamaTokenizer). What comes before the first words may differ."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    kind = type(tokenizer)
    if kind is PreTrainedTokenizerFast or not issubclass(kind, PreTrainedTokenizerFast):
        return
    missing = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(local, "tokenizer.json", revision=revision, **missing)
    if path is None:
        return
    own = Tokenizer.from_file(path)
    own.no_padding()
    own.no_truncation()
    given = own.encode(_SPLIT, add_special_tokens=False).ids
    made = tokenizer.encode(_SPLIT, add_special_tokens=False)
    end = len(given) // 2
    if given[-end:] != made[-end:]:
        raise PromptError(
            f"{model}: its tokenizer_config.json names a class ({kind.__name__}) by which transformers makes "
            'other tokens than its tokenizer.json: write "tokenizer_class": "PreTrainedTokenizerFast" there'
        )


_SPLIT = "A cat  naps,\nun café — 一只猫 don't (12.5%) while the two dogs of a neighbour watch it from afar."

# Text that must pass through a template unchanged: forms that known templates cut, trim or rewrite.
_PROBES = (
    "a red kite",
    "  A cat\n\n\ttwo Dogs,  3 birds \r\n{{ 7*7 }} {% if x %} {query} {} %s \\n \"quoted\" 'so' &amp; <b>",
    "\u732b \u043a\u043e\u0448\u043a\u0430 \U0001f408\u200d\u2b1b e\u0301 \ufb01 \u202eabc\u202c\u00a0\u2028",
    "<think>one</think> two [INST] three [/INST] <|im_end|> </s> <tool_response>\nfour\n</tool_response>",
    " ".join(f"word{number}" for number in range(4000)),
)


def _proven(model: str, tokenizer: Any, task_prompt: str) -> str:
    """The tokenizer's template, with the task prompt if given, in a form that shows the query."""
    own = tokenizer.chat_template
    before, after = task_prompt.split(SLOT) if task_prompt.count(SLOT) == 1 else ("", "")
    refused: list[PromptError] = []
    for shape in (own, _PARTS + own):
        opened = _opening_answer(tokenizer, shape)
        form = fold_task_prompt(opened, task_prompt) if task_prompt else opened
        try:
            _prove(model, tokenizer, form, before, after)
            return form
        except PromptError as error:
            refused.append(error)
    raise refused[0]


def _opening_answer(tokenizer: Any, template: str) -> str:
    """The template, with what it puts before every answer also where an answer is asked for
    (`add_generation_prompt`): some do without, and the model would write that heading itself."""
    answer = "vpo-ray-answer"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

    def rendered(messages: Sequence[Mapping[str, str]], form: str, asks: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=form, add_generation_prompt=asks, tokenize=False
            )
        )

    try:
        told, asked = (rendered(turns[:1], template, asks) for asks in (False, True))
        before, found, _ = rendered(turns, template, False).partition(answer)
        heading = before.removeprefix(told).rstrip(" ")
        if told != asked or not found or not before.startswith(told) or not heading.strip():
            return template
        # Jinja drops one line feed at the end of a template.
        ending = f"{{% if add_generation_prompt %}}{{{{ {literal(heading)} }}}}{{% endif %}}"
        opened = template.removesuffix("\n") + ending
        return opened if rendered(turns[:1], opened, True) == told + heading else template
    except Exception:  # noqa: BLE001  a template is somebody else's program, and this one has no answers
        return template


def _prove(model: str, tokenizer: Any, template: str, before: str, after: str) -> None:
    """Raises PromptError if the template changes a user's message or the text around it."""
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
        except Exception as error:  # a template is somebody else's program
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
    """Raises PromptError if a query could complete a control token with the text around it."""
    for token in tokens:
        for cut in range(1, len(token)):
            begun, ended = token[:cut], token[cut:]
            if (begun.strip() and before.endswith(begun)) or (ended.strip() and after.startswith(ended)):
                side = f"after {begun!r}" if before.endswith(begun) else f"before {ended!r}"
                raise PromptError(
                    f"{model}: the query comes {side}, a part of the control token {token!r}, and could "
                    "complete it: put a space or an end of line between them, in policy.task_prompt or the "
                    "chat template"
                )


_ADVICE = (
    "Give the checkpoint's folder a chat_template.jinja that shows the one user message as it is, or use "
    "another checkpoint"
)
