"""Export a run's SFT and preference data for other trainers: `vpo export RECIPE --format trl --to DIR`.

A row's user message is the task prompt with the query in it: what the policy sees, as text, since
other trainers start from a model whose chat template holds no task prompt (`--bare` is for one
that does: a checkpoint of ours).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vpo_ray.engines.chat.tokenizer import load_chat_tokenizer
from vpo_ray.files.folder import Folder
from vpo_ray.files.record_files import json_line
from vpo_ray.files.text_files import decode, lines
from vpo_ray.prompts.conditions import asked_of
from vpo_ray.prompts.policy_prompt import SLOT, control_tokens, neutralise, read_prompt
from vpo_ray.recipe import Recipe, locate
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir

Message = dict[str, str]
SFT_FILE, PREFERENCE_FILE, INFO_FILE = "sft.jsonl", "preference.jsonl", "dataset_info.json"

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
    """A run that holds nothing to export, or a file of somebody else where it is to go."""


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
        ExportError: the run has neither SFT data nor pairs, or a file is there that is no export of this
            run. Nothing is written then.
        PromptError: the policy's tokenizer has no chat template.
        StorageError: the run cannot be read or the folder not written.
    """
    sft = sorted(run.table("sft").rows(), key=lambda row: (row["query_id"], row["prompt"]))
    if not sft:
        from vpo_ray.storage.sft_data import draft_rows, evolved_rows

        sft = list(draft_rows(run)) or list(evolved_rows(run))
    pairs = sorted(run.table("pairs").rows(), key=lambda row: row["pair_id"])
    if not sft and not pairs:
        raise ExportError(f"{run.uri} has neither SFT data (`vpo sft`, `vpo draft`) nor pairs (`vpo pair`)")
    task_prompt = SLOT if bare else read_prompt(recipe.policy.task_prompt)
    tokens: tuple[str, ...] = ()
    if format != "openai":
        policy = recipe.policy
        tokenizer = load_chat_tokenizer(locate(policy.model), policy.revision, policy.trust_remote_code)
        tokens = control_tokens(tokenizer)
    folder, files = Folder(to), {}
    if sft:
        files[SFT_FILE] = sft_lines(sft, task_prompt, format, tokens)
    if pairs:
        files[PREFERENCE_FILE] = preference_lines(pairs, task_prompt, format, tokens)
    for name, rows in files.items():
        _check_replaceable(folder, name, rows)
    texts = {name: "".join(map(json_line, rows)) for name, rows in files.items()}
    if format == "llamafactory":
        texts[INFO_FILE] = _dataset_info(folder, set(files))
    for name, text in texts.items():
        folder.write(name, text.encode())
    return {name: len(rows) for name, rows in files.items()}


def sft_lines(rows: Iterable[Row], task_prompt: str, format: str, tokens: tuple[str, ...] = ()) -> list[Row]:
    """Rows of `query` and `prompt` as lines of a format.

    Args:
        tokens: control tokens to break up in every text.
    """
    line, _ = FORMATS[format]
    return [line(_user(row, task_prompt, tokens), _assistant(row["prompt"], tokens)) for row in rows]


def preference_lines(
    rows: Iterable[Row], task_prompt: str, format: str, tokens: tuple[str, ...] = ()
) -> list[Row]:
    """Pair rows as lines of a format; see `sft_lines`."""
    _, line = FORMATS[format]
    return [
        line(
            _user(row, task_prompt, tokens),
            _assistant(row["chosen"], tokens),
            _assistant(row["rejected"], tokens),
        )
        for row in rows
    ]


def _user(row: Row, task_prompt: str, tokens: tuple[str, ...]) -> Message:
    return {"role": "user", "content": task_prompt.replace(SLOT, neutralise(asked_of(row), tokens))}


def _assistant(text: str, tokens: tuple[str, ...]) -> Message:
    return {"role": "assistant", "content": neutralise(text, tokens)}


def _dataset_info(folder: Folder, names: set[str]) -> str:
    """LLaMA-Factory's list of data sets, with ours of these files in it; what is there already stays."""
    ours = {name: info for name, info in sorted(_DATASET_INFO.items()) if info["file_name"] in names}
    listed: Any = {}
    if folder.exists(INFO_FILE):
        where = folder.at(INFO_FILE)
        try:
            listed = json.loads(decode(folder.read(INFO_FILE), where))
        except (OSError, ValueError) as error:
            raise ExportError(f"{where} cannot be read, and is left as it is: {error}") from error
        if not isinstance(listed, dict):
            raise ExportError(
                f"{where} is no JSON object of data sets, and is left as it is: give another --to"
            )
    return (
        json.dumps({**listed, **json.loads(json.dumps(ours, sort_keys=True))}, indent=2, ensure_ascii=False)
        + "\n"
    )


def _check_replaceable(folder: Folder, name: str, new: Sequence[Row]) -> None:
    """Raises ExportError where a file is there that is no earlier export of this run: no answer in it is
    one of the new ones."""
    if not folder.exists(name):
        return
    where = folder.at(name)
    try:
        old = [json.loads(line) for line in lines(decode(folder.read(name), where)) if line.strip()]
    except (OSError, ValueError) as error:
        raise ExportError(f"{where} is there, and cannot be read as an export: {error}") from error
    if old and not _answers(old) & _answers(new):
        raise ExportError(
            f"{where} is there and holds other data, which stays: give another --to, or move it away"
        )


def _answers(value: Any) -> set[str]:
    """What assistants say anywhere in a value."""
    if isinstance(value, list):
        return set().union(*map(_answers, value))
    if not isinstance(value, dict):
        return set()
    said = (
        {value["content"]}
        if value.get("role") == "assistant" and isinstance(value.get("content"), str)
        else set()
    )
    return said.union(*map(_answers, value.values()))
