"""The cause of an endpoint's error: the settings, one input, the requested form, or a passing condition.

Services use all kinds of statuses and wordings, so their codes, keys and words are searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

# Wrong settings or an empty account, not a wrong request.
STOPS = frozenset({401, 402, 403, 404})
RETRIED = frozenset({408, 409, 425, 429})
# Characters of an error's text that are searched.
LOOKED_AT = 20_000


class EndpointError(ValueError):
    """An endpoint that cannot be used with these settings.

    Attributes:
        status: HTTP status, or None where there was no answer at all.
        body: the error that the server sent, as text.
    """

    stops_run = True  # see stream/stops.py
    filtered = False

    def __init__(self, message: str, status: int | None = None, body: str = "") -> None:
        super().__init__(message)
        self.status, self.body = status, body


class RequestError(RuntimeError):
    """One request that the endpoint did not answer; others may succeed.

    Attributes:
        status: HTTP status, or None where there was no answer at all.
        filtered: a content filter refused it.
        body: the error that the server sent, as text.
    """

    def __init__(
        self, message: str, status: int | None = None, filtered: bool = False, body: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.filtered, self.body = status, filtered, body


# Codes of a refused input, without case and punctuation: OpenAI, Azure, OpenRouter, Gemini, DashScope,
# Volcengine, MiniMax, Zhipu (1301), Bedrock and others use such words.
_CODE = re.compile(
    "contentfilter|contentpolicy|policyviolation|moderat|datainspection|prohibitedcontent|sensitive"
    "|flagged|safety|guardrail|inappropriate|unsafe|riskcontrol|invalidprompt|blocklist|harmful|^1301$"
)
_CODE_KEYS = frozenset({"code", "type", "status", "reason", "reasons", "errorcode", "errcode", "error",
                        "blockreason", "finishreason"})  # fmt: skip
# Keys that only a refused input has.
_KEYS = frozenset({"flaggedinput", "contentfilterresult", "contentfilterresults", "promptfeedback",
                   "blockreason", "safetyratings", "moderation"})  # fmt: skip
# Codes that services write into the message.
_WRITTEN = re.compile(
    r"content_filter|content_policy_violation|moderation_blocked|ResponsibleAIPolicyViolation"
    r"|data_?inspection_?failed|PROHIBITED_CONTENT|SAFETY_CHECK",
    re.IGNORECASE,
)
_INPUT = re.compile(
    r"""content[\s_-]*(?:management|filter|moderation|polic|safety|security|violat|guard)
    | moderat(?:ion|ed) | flagged | safety\s(?:system|filter|polic|check|guideline|guard|reason|concern)
    | (?:usage|acceptable\suse|community|responsible\sai)[\w\s]{0,20}(?:polic|guideline)
    | inappropriate | harmful | \bunsafe | sensitive | prohibited\scontent | objectionable
    | violat\w+[^.]{0,60}(?:polic|guideline|terms) | violence | sexual | nsfw
    | (?:prompt|input|content)\s(?:(?:was|is|has\sbeen)\s)?blocked | (?:exists|high)\srisk
    | blocked\s(?:by|due|because|for)[^.]{0,60}(?:content|safety|filter|polic)
    | 敏感 | 违规 | 不安全 | 内容安全 | 审核 | 不当内容""",
    re.VERBOSE | re.IGNORECASE,
)
_ACCOUNT = re.compile(
    r"""api[\s_-]*key | \bkey\b | account | organi[sz]ation | billing | credit | balance | quota | subscri
    | permission | authenti | authori[sz] | access\s(?:is\s)?denied | credential
    | token\s(?:is|has|was|expired|invalid) | country | region | territory | suspend | deactivat | \bip\b
    | 欠费 | 余额 | 权限 | 密钥 | 账户 | 账号""",
    re.VERBOSE | re.IGNORECASE,
)
# An account that was suspended, for earlier requests: this says nothing about the input.
_SHUT = re.compile(
    r"(?:account|organi[sz]ation|api[\s_-]*key|access|project)\b[^.]{0,40}"
    r"(?:suspend|deactivat|disabled|banned|blocked|terminated|revoked|restricted|flagged)",
    re.IGNORECASE,
)
_SCHEMA = re.compile(
    r"""response[\s_-]?(?:format|schema|mime) | json[\s_-]?(?:schema|mode|object|output) | \bschema
    | structured | guided | grammar | constrained | \bstrict\b | outlines | xgrammar
    | output[\s_-]?format | 结构化""",
    re.VERBOSE | re.IGNORECASE,
)
# Chat templates of some models know users and assistants only.
_SYSTEM = re.compile(
    r"system\W{0,3}(?:role|message|prompt|instruction)|role\W{1,5}system|roles\s+must\s+alternate",
    re.IGNORECASE,
)
_LENGTH = re.compile(
    r"context[\s_-]*(?:length|window|size)|maximum[\s\w]{0,20}(?:context|length|tokens)"
    r"|too\s(?:long|many\stokens|large)|max_(?:model_len|tokens|completion_tokens)|token\slimit",
    re.IGNORECASE,
)


def about(status: int, body: Any, text: str) -> Literal["input", "account", "either", "other"]:
    """What an error is about: an input refused for its content, the account or key, either of these (a bare
    403), or something else.

    Args:
        body: the JSON value of the error.
        text: the same as text.
    """
    text = text[:LOOKED_AT]
    if status in (401, 402):
        return "account"
    if _SHUT.search(text):
        return "account" if status == 403 else "other"
    keys, codes = set(), []
    for key, value in _leaves(body):
        keys.add(key)
        if key in _CODE_KEYS:
            codes.append(_plain(value))
    if keys & _KEYS or any(map(_CODE.search, codes)) or _WRITTEN.search(text) or status == 451:
        return "input"
    of_input, of_account = _INPUT.search(text) is not None, _ACCOUNT.search(text) is not None
    if status == 403:
        if of_input != of_account:
            return "input" if of_input else "account"
        return "either"
    plain = 400 <= status < 500 and status not in (404, 408, 429)
    return "input" if plain and of_input and not of_account else "other"


def about_schema(error: EndpointError | RequestError) -> bool:
    """Whether a server says that it takes no JSON schema, or not this one."""
    known = error.status is not None and error.status not in (401, 402)
    return known and not error.filtered and _SCHEMA.search(error.body[:LOOKED_AT]) is not None


def about_system(error: EndpointError | RequestError) -> bool:
    """Whether a server says that the model takes no system message."""
    known = error.status is not None and error.status not in (401, 402, 403)
    return known and not error.filtered and _SYSTEM.search(error.body[:LOOKED_AT]) is not None


def maybe_schema(error: EndpointError | RequestError) -> bool:
    """Whether an error may be due to a JSON schema although it does not say so."""
    status = error.status or 0
    refused = status >= 400 and status not in {401, 402, 403, 413, *RETRIED} and not about_system(error)
    return refused and not error.filtered and _LENGTH.search(error.body[:LOOKED_AT]) is None


def may_pass(error: EndpointError | RequestError) -> bool:
    """Whether an error may be temporary, and says nothing about later requests."""
    return (error.status or 0) >= 500 and error.status != 501 and not about_schema(error)


def _leaves(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every key of an error, without case and punctuation, with its value as text."""
    if depth > 20:
        return
    if isinstance(value, dict):
        for name, inner in value.items():
            plain = _plain(str(name))
            yield plain, ""
            yield from _leaves(inner, plain, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key, depth + 1)
    elif isinstance(value, str | int):
        yield key, str(value)


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text[:200].lower())
