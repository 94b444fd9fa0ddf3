"""The text models of a recipe, looked at as a run will load them, but without their weights.

A chat template through which a query does not pass, a tokenizer or a generation config that does not load or
could not be exported is found before a GPU is touched. It is looked at in a process of its own, where
transformers does without torch: importing that takes longer than the look.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vpo_ray.engines.chat.tokenizer import load_chat_tokenizer, load_tokenizer
from vpo_ray.plan.folders import local_path
from vpo_ray.prompts.policy_prompt import PromptError, chat_ids, read_prompt
from vpo_ray.recipe import Recipe, locate

logger = logging.getLogger(__name__)

TIMEOUT_S = 120
# What a check depends on, beside the recipe.
_FILES = ("*.json", "*.jinja", "*.model", "*.py")


@dataclass(frozen=True)
class ModelCheck:
    """A model to look at: how it is loaded, and whether it is a policy to be trained, which is exported."""

    key: str
    model: str
    revision: str | None
    trust_remote_code: bool
    arguments: dict[str, Any]
    task_prompt: str | None = None
    trained: bool = False
    keeps_base: bool = False  # LoRA adapters alone are exported


def model_problems(recipe: Recipe, known: Set[str]) -> list[str]:
    """A line for each text model in a folder here that will not load, or could not be exported.

    Args:
        known: keys of what is known to be wrong, which is not looked at.
    """
    asked = [ask for ask in asks(recipe, known) if ask.key not in known]
    if not asked:
        return []
    state = [
        (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        for ask in asked
        for pattern in _FILES
        for path in sorted(Path(ask.model).glob(pattern))
    ]
    return list(_looked(json.dumps([asdict(ask) for ask in asked]), repr(state)))


def asks(recipe: Recipe, known: Set[str] = frozenset()) -> Iterator[ModelCheck]:
    """The models in folders of this machine. An adapter is left out: its tokenizer may be another's."""
    policy, phase = recipe.policy, recipe.sft or recipe.learning
    if local_path(policy.model).is_dir() and "policy.task_prompt" not in known:
        yield ModelCheck(
            "policy.model", locate(str(local_path(policy.model))), policy.revision, policy.trust_remote_code,
            policy.chat_template_kwargs, read_prompt(policy.task_prompt), phase is not None,
            phase is not None and phase.lora is not None and not phase.lora.merge,
        )  # fmt: skip
    of_draft = recipe.draft.llm if recipe.draft is not None else None
    of_evolve = recipe.evolve.llm if recipe.evolve is not None else None
    llms = {"judge.model": recipe.judge, "draft.llm.model": of_draft, "evolve.llm.model": of_evolve}
    for key, llm in llms.items():
        if llm is None or llm.backend != "vllm" or not local_path(llm.model).is_dir():
            continue
        if not (local_path(llm.model) / "adapter_config.json").is_file():
            where = locate(str(local_path(llm.model))), llm.revision
            yield ModelCheck(key, *where, llm.trust_remote_code, llm.chat_template_kwargs)


def check_models() -> None:
    """In the process of its own: what is asked comes by stdin, problems go to stdout as a line of JSON."""
    asked = [ModelCheck(**ask) for ask in json.load(sys.stdin)]
    if not any(ask.trust_remote_code for ask in asked):
        sys.modules["torch"] = None  # type: ignore[assignment]
    sys.stdout.write("\n" + json.dumps([line for ask in asked for line in _problems(ask)]) + "\n")


@functools.lru_cache(maxsize=64)
def _looked(asked: str, state: str) -> tuple[str, ...]:
    del state  # a part of the cache's key
    here = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONIOENCODING": "utf-8",
    }
    # -P: no file of the working directory shadows a module.
    command = [sys.executable, "-P", "-c", "from vpo_ray.plan.models import check_models; check_models()"]
    try:
        done = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            env=environment,
        )
        if done.returncode == 0:
            return tuple(json.loads(done.stdout.strip().rpartition("\n")[2]))
        why = (done.stderr.strip() or "it ended without a word").rpartition("\n")[2]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        why = str(error)
    logger.warning("chat templates and tokenizers could not be looked at here: %s", why)
    return ()


def _problems(ask: ModelCheck) -> Iterator[str]:
    try:
        tokenizer = _loaded(ask)
    except PromptError as error:
        yield f"{ask.key}: {error}"
        return
    if strange := _strange_token(ask.model, tokenizer):
        yield f"{ask.key}: {strange}"
        return
    if ask.task_prompt is not None and ask.trained:
        yield from _exports(ask, tokenizer, ask.task_prompt)


def _loaded(ask: ModelCheck) -> Any:
    how = ask.revision, ask.trust_remote_code, ask.arguments
    try:
        if ask.task_prompt is None:
            return load_chat_tokenizer(ask.model, *how)
        return load_tokenizer(ask.model, ask.task_prompt, *how)
    except PromptError:
        raise
    except Exception as error:  # whatever the files of others lead transformers to
        if "trust_remote_code" in str(error):
            from vpo_ray.train.rehearsal import OWN_CODE

            raise PromptError(f"{ask.model} {OWN_CODE}") from error
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise PromptError(f"{ask.model}: its tokenizer does not load: {why}") from error


def _strange_token(model: str, tokenizer: Any) -> str | None:
    """What is wrong where a prompt has tokens that the model has no embedding of."""
    from vpo_ray.train.rehearsal import PROBE

    try:
        config = json.loads(Path(model, "config.json").read_text("utf-8"))
        size = int((config.get("text_config") or config)["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # the class decides
    largest = max(chat_ids(tokenizer, [{"role": "user", "content": PROBE}]))
    if largest < size:
        return None
    token = tokenizer.convert_ids_to_tokens(largest)
    return (
        f"{model}: a prompt has the token {token!r} ({largest}), and its config.json makes {size} "
        "embeddings: tokens were added to the tokenizer and not to the model, or they do not belong together"
    )


def _exports(ask: ModelCheck, tokenizer: Any, task_prompt: str) -> Iterator[str]:
    from vpo_ray.train.examples import TrainError, end_of_turn
    from vpo_ray.train.rehearsal import rehearse_texts

    try:
        end = end_of_turn(tokenizer, task_prompt)
        rehearse_texts(ask.model, tokenizer, end, ask.keeps_base, ask.revision, ask.trust_remote_code)
    except TrainError as error:
        yield f"{ask.key}: {error}"
