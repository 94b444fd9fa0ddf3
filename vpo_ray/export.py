"""Export a run's SFT and preference data for other trainers: `vpo export RECIPE --format trl --to DIR`.

A row's user message is the task prompt with the query in it: what the policy sees, as text, since
other trainers start from a model whose chat template holds no task prompt (`--bare` is for one
that does: a checkpoint of ours).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vpo_ray.policy_prompt import SLOT, control_tokens, load_chat_tokenizer, neutralise, read_prompt
from vpo_ray.recipe import Recipe, locate
from vpo_ray.record_files import json_line
from vpo_ray.records import Row
from vpo_ray.storage import Folder, RunDir

Message = dict[str, str]
SFT_FILE, PREFERENCE_FILE = "sft.jsonl", "preference.jsonl"

# LLaMA-Factory's names of the parts of a message, here as OpenAI has them.
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
_DATASET_INFO: dict[str, dict[str, Any]] = {
    "vpo_sft": {
        "file_name": SFT_FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": _TAGS,
    },
    "vpo_preference": {
        "file_name": PREFERENCE_FILE,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "tags": _TAGS,
    },
}


class ExportError(ValueError):
    """A run that holds nothing to export."""


def _trl_sft(user: Message, answer: Message) -> Row:
    return {"prompt": [user], "completion": [answer]}


def _trl_preference(user: Message, chosen: Message, rejected: Message) -> Row:
    return {"prompt": [user], "chosen": [chosen], "rejected": [rejected]}


def _chat_sft(user: Message, answer: Message) -> Row:
    return {"messages": [user, answer]}


def _llamafactory_preference(user: Message, chosen: Message, rejected: Message) -> Row:
    return {"messages": [user], "chosen": chosen, "rejected": rejected}


def _openai_preference(user: Message, chosen: Message, rejected: Message) -> Row:
    return {
        "input": {"messages": [user], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [chosen],
        "non_preferred_output": [rejected],
    }


# Format -> a line of SFT data, a line of preference data.
FORMATS: dict[str, tuple[Callable[[Message, Message], Row], Callable[[Message, Message, Message], Row]]] = {
    "trl": (_trl_sft, _trl_preference),
    "llamafactory": (_chat_sft, _llamafactory_preference),
    "openai": (_chat_sft, _openai_preference),
}


def export(recipe: Recipe, run: RunDir, format: str, to: str, bare: bool = False) -> dict[str, int]:
    """Write SFT_FILE and PREFERENCE_FILE, of the data that the run has, into a folder.

    Text is written with the policy's control tokens broken up, as our own training reads it: other
    trainers would take them from text. OpenAI's service does not, and gets it as it is.

    Args:
        format: one of FORMATS.
        to: folder or URI.
        bare: the query alone is the user's message, for a model whose template holds the task prompt.

    Returns:
        Rows by file.

    Raises:
        ExportError: the run has neither SFT data nor pairs.
        PromptError: the policy's tokenizer has no chat template.
        StorageError: the run cannot be read or the folder not written.
    """
    sft = sorted(run.table("sft").rows(), key=lambda row: (row["query_id"], row["prompt"]))
    if not sft:
        from vpo_ray.sft_data import draft_rows

        sft = list(draft_rows(run))
    pairs = sorted(run.table("pairs").rows(), key=lambda row: row["pair_id"])
    if not sft and not pairs:
        raise ExportError(f"{run.uri} has neither SFT data (`vpo sft`, `vpo draft`) nor pairs (`vpo pair`)")
    task_prompt = SLOT if bare else read_prompt(recipe.policy.task_prompt)
    tokens: tuple[str, ...] = ()
    if format != "openai":
        policy = recipe.policy
        tokenizer = load_chat_tokenizer(locate(policy.model), policy.revision, policy.trust_remote_code)
        tokens = control_tokens(tokenizer)
    folder, written = Folder(to), {}
    if sft:
        written[SFT_FILE] = _write(folder, SFT_FILE, sft_lines(sft, task_prompt, format, tokens))
    if pairs:
        lines = preference_lines(pairs, task_prompt, format, tokens)
        written[PREFERENCE_FILE] = _write(folder, PREFERENCE_FILE, lines)
    if format == "llamafactory":
        known = {name: info for name, info in _DATASET_INFO.items() if info["file_name"] in written}
        folder.write_json("dataset_info.json", known)
    return written


def sft_lines(rows: Iterable[Row], task_prompt: str, format: str, tokens: tuple[str, ...] = ()) -> list[Row]:
    """Rows of `query` and `prompt` as lines of a format.

    Args:
        tokens: control tokens to break up in every text.
    """
    line, _ = FORMATS[format]
    return [line(_user(row["query"], task_prompt, tokens), _assistant(row["prompt"], tokens)) for row in rows]


def preference_lines(
    rows: Iterable[Row], task_prompt: str, format: str, tokens: tuple[str, ...] = ()
) -> list[Row]:
    """Pair rows as lines of a format; see `sft_lines`."""
    _, line = FORMATS[format]
    return [
        line(
            _user(row["query"], task_prompt, tokens),
            _assistant(row["chosen"], tokens),
            _assistant(row["rejected"], tokens),
        )
        for row in rows
    ]


def _user(query: str, task_prompt: str, tokens: tuple[str, ...]) -> Message:
    return {"role": "user", "content": task_prompt.replace(SLOT, neutralise(query, tokens))}


def _assistant(text: str, tokens: tuple[str, ...]) -> Message:
    return {"role": "assistant", "content": neutralise(text, tokens)}


def _write(folder: Folder, name: str, lines: Sequence[Any]) -> int:
    folder.write(name, "".join(map(json_line, lines)).encode())
    return len(lines)
