"""A query passes through the template of any checkpoint, or the checkpoint is refused when it is loaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.engines.chat.tokenizer import load_chat_tokenizer, load_tokenizer
from vpo_ray.prompts.policy_prompt import (
    PromptError,
    chat_ids,
    fold_task_prompt,
    is_folded,
    own_template,
    prompt_ids,
)
from vpo_ray.train.examples import end_of_turn, tokenise

TASK = "Rewrite it.\n\nUser request: {query}\n\nPrompt:"
QUERY = "a red kite\n  and {{ 7 }} 猫 <|end|>"
SHOWN = "Rewrite it.\n\nUser request: a red kite\n  and {{ 7 }} 猫 < |end|>\n\nPrompt:"


def template(content: str = "m['content']", before: str = "") -> str:
    """A template that shows `content` of every message, behind something else."""
    return (
        f"{{{{ bos_token }}}}{{% for m in messages %}}{before}"
        "{{ '<|head|>' + m['role'] + '<|/head|>' }}{{ " + content + " }}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"
    )


PLAIN = template()
PARTS = template("''").replace(
    "{{ '' }}",
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}",
)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """Saves a byte-level tokenizer with a template, as a released checkpoint has it; gives its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def save(chat_template: Any, name: str = "policy") -> str:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        made = PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<|bos|>",
            eos_token="<|end|>",
            additional_special_tokens=["<|head|>", "<|/head|>"],
        )
        made.chat_template = chat_template if isinstance(chat_template, str) else None
        made.save_pretrained(tmp_path / name)
        if isinstance(chat_template, list):
            path = tmp_path / name / "tokenizer_config.json"
            path.write_text(
                json.dumps({**json.loads(path.read_text("utf-8")), "chat_template": chat_template}), "utf-8"
            )
        return str(tmp_path / name)

    return save


def shown(tokenizer: Any, query: str = QUERY) -> str:
    return str(tokenizer.decode(prompt_ids(tokenizer, query)))


def by_transformers(folder: Path, content: Any) -> str:
    """What transformers alone makes of one user message."""
    from transformers import AutoTokenizer

    message = {"role": "user", "content": content}
    return str(
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False
        )
    )


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


@pytest.mark.parametrize("form", ["list", "files", "one file"])
def test_of_several_templates_it_is_the_default_one(
    saved: Callable[..., str], tmp_path: Path, form: str
) -> None:
    folder = Path(saved(named(default=PLAIN, tool_use="tools" + PLAIN) if form == "list" else PLAIN))
    if form == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/rag.jinja").write_text("documents" + PLAIN, "utf-8")
    tokenizer = load_tokenizer(str(folder), TASK)
    expected = f"<|bos|><|head|>user<|/head|>{SHOWN}<|end|><|head|>assistant<|/head|>"
    assert shown(tokenizer) == expected
    # The folder that training leaves, and the base's own folder saved over.
    for out in (tmp_path / "out", folder):
        tokenizer.save_pretrained(out)
        assert shown(load_tokenizer(str(out))) == expected
        assert by_transformers(out, QUERY.replace("<|", "< |")) == expected


def test_without_a_default_one_the_names_are_told(saved: Callable[..., str]) -> None:
    with pytest.raises(PromptError, match=r"rag, tool_use and none named default: save"):
        load_tokenizer(saved(named(tool_use=PLAIN, rag=PLAIN)), TASK)
    folder = Path(saved(PLAIN, "files"))
    (folder / "additional_chat_templates").mkdir()
    shutil.move(folder / "chat_template.jinja", folder / "additional_chat_templates/tool_use.jinja")
    with pytest.raises(PromptError, match="tool_use and none named default"):
        load_chat_tokenizer(str(folder))


@pytest.mark.parametrize("form", [PARTS, named(default=PARTS, other="x")])
def test_a_template_that_takes_parts_is_given_parts(
    saved: Callable[..., str], tmp_path: Path, form: Any
) -> None:
    folder = saved(form)
    tokenizer = load_tokenizer(folder, TASK)
    expected = f"<|bos|><|head|>user<|/head|>{SHOWN}<|end|><|head|>assistant<|/head|>"
    assert shown(tokenizer) == expected
    assert tokenizer.decode(end_of_turn(tokenizer, TASK)) == "<|end|>"
    tokenizer.save_pretrained(tmp_path / "out")
    assert shown(load_tokenizer(str(tmp_path / "out"))) == expected
    # A judge's, whose messages are not folded.
    judge = load_chat_tokenizer(folder)
    turns = [{"role": r, "content": t} for r, t in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert judge.decode(chat_ids(judge, turns)).count("<|head|>") == 4


@pytest.mark.parametrize("form", [PLAIN, PARTS])
def test_other_servers_may_hand_over_parts(saved: Callable[..., str], tmp_path: Path, form: str) -> None:
    load_tokenizer(saved(form), TASK).save_pretrained(tmp_path / "out")
    parts = [{"type": "text", "text": "a cat"}, {"type": "image"}, {"type": "text", "text": "at night"}]
    assert by_transformers(tmp_path / "out", parts) == by_transformers(tmp_path / "out", "a cat\nat night")


OPENED = "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"


@pytest.mark.parametrize("form", [PLAIN, PLAIN + "\n", PARTS, named(default=PLAIN, other="x")])
def test_a_template_that_does_not_open_the_answer_is_completed(
    saved: Callable[..., str], tmp_path: Path, form: Any
) -> None:
    """Else the policy writes the heading of its turn into every prompt."""

    def cut(text: str) -> str:
        assert OPENED in text
        return text.replace(OPENED, "")

    closed = cut(form) if isinstance(form, str) else [{**one, "template": one["template"]} for one in form]
    if isinstance(closed, list):
        closed[0]["template"] = cut(closed[0]["template"])
    tokenizer = load_tokenizer(saved(closed), TASK)
    expected = f"<|bos|><|head|>user<|/head|>{SHOWN}<|end|><|head|>assistant<|/head|>"
    assert shown(tokenizer) == expected
    assert tokenizer.decode(end_of_turn(tokenizer, TASK)) == "<|end|>"
    tokenizer.save_pretrained(tmp_path / "out")
    assert shown(load_tokenizer(str(tmp_path / "out"))) == expected
    judge = load_chat_tokenizer(saved(closed))
    assert judge.decode(chat_ids(judge, [{"role": "user", "content": "a"}])).endswith("assistant<|/head|>")


@pytest.mark.parametrize(
    ("turn", "end"),
    [
        (
            "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content }}",
            "",
        ),
        ("{% if m.role == 'user' %}{{ m.content }}{% else %}{{ raise_exception('no') }}", ""),
        ("{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% else %}{{ ' BOT: ' + m.content }}", " BOT:"),
    ],
)
def test_only_what_stands_before_every_answer_is_added(
    saved: Callable[..., str], turn: str, end: str
) -> None:
    template = f"{{% for m in messages %}}{turn}{{% endif %}}{{% endfor %}}"
    tokenizer = load_chat_tokenizer(saved(template))
    asked = str(tokenizer.decode(chat_ids(tokenizer, [{"role": "user", "content": "a cat"}])))
    own = {"": ("[INST] a cat [/INST]", "a cat"), " BOT:": ("USER: a cat BOT:",)}[end]
    assert asked in own


LOSING = {
    "nothing of a user": PLAIN.replace("for m in messages", "for m in messages if m.role == 'system'"),
    "all but the last": PLAIN.replace("for m in messages", "for m in messages[:-1]"),
    "upper case": template("m['content'] | upper"),
    "lower case": template("m['content'] | lower"),
    "title": template("m['content'] | title"),
    "cut": template("m['content'][:2000]"),
    "truncated": template("m['content'] | truncate(8000)"),
    "one line": template("m['content'] | replace('\\n', ' ')"),
    "words": template("m['content'].split() | join(' ')"),
    "escaped": template("m['content'] | e"),
    "as JSON": template("m['content'] | tojson"),
    "behind a thought": template("m['content'].split('</think>')[-1]"),
    "without tags": template("m['content'] | striptags"),
    "ASCII": template("m['content'].encode('ascii', 'ignore').decode()"),
    "other field": template("m['text']"),
    "nested": template("m['content']['text']"),
    "parts in upper case": PARTS.replace("{{ p['text'] }}", "{{ p['text'] | upper }}"),
    "one character of parts": PARTS.replace("{{ p['text'] }}", "{{ p['text'][0] }}"),
    "raises for a user first": template(before="{{ raise_exception('begin with system') }}"),
    "not a template": "{% for",
    "empty answer": "{{ '' }}",
}


@pytest.mark.parametrize("name", LOSING)
def test_a_template_that_loses_the_query_is_refused_when_it_is_loaded(
    saved: Callable[..., str], name: str
) -> None:
    folder = saved(LOSING[name])
    for load in (lambda: load_tokenizer(folder, TASK), lambda: load_chat_tokenizer(folder)):
        with pytest.raises(
            PromptError, match=r"chat template (refuses|changes|leaves out).*chat_template\.jinja"
        ) as told:
            load()
        assert folder in str(told.value)
    if name.startswith("raises"):
        assert "begin with system" in str(told.value)
    # The same, of a folder that was folded before it could be refused.
    folded = Path(saved(fold_task_prompt(LOSING[name], TASK), "folded"))
    with pytest.raises(PromptError):
        load_tokenizer(str(folded))


@pytest.mark.parametrize(
    "kept",
    [
        template("m['content'] | trim"),
        template("m.content.strip()"),
        template(before="{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"),
        template("m['content'] if m['content'] is string else m['content'][0]['text']"),
        "\ufeff" + PLAIN,
    ],
)
@pytest.mark.parametrize("task", [TASK, "{query}", "{query} rewritten", "Rewrite {query}"])
def test_a_template_that_keeps_it_is_taken(saved: Callable[..., str], kept: str, task: str) -> None:
    text = shown(load_tokenizer(saved(kept), task))
    assert task.replace("{query}", "a red kite\n  and {{ 7 }} 猫 < |end|>") in text
    assert text.startswith("<|bos|>")


def test_no_row_is_learnt_whose_query_the_template_changes(saved: Callable[..., str]) -> None:
    """However much is tried when it is loaded, a template may look for one word."""
    sly = template("(m['content'] | replace('kite', 'dog'))", before="{% set x = 1 %}").replace(
        "replace('kite', 'dog')", "replace('zeppelin', 'dog')"
    )
    tokenizer = load_tokenizer(saved(sly), TASK)
    rows = [{"query_id": q, "query": q, "prompt": "x"} for q in ("a zeppelin", "a kite")]
    examples, dropped = tokenise("sft", rows, tokenizer, TASK, 500)
    assert (len(examples), dropped) == (1, {"changed by the chat template": 1})
    with pytest.raises(PromptError, match="leaves out or changes"):
        prompt_ids(tokenizer, "a zeppelin")


def test_arguments_go_to_the_default_template(saved: Callable[..., str], tmp_path: Path) -> None:
    thinking = PARTS + "{% if not enable_thinking | default(true) %}{{ '<think></think>' }}{% endif %}"
    folder = saved(named(default=thinking, other="x"))
    assert not shown(load_tokenizer(folder, TASK)).endswith("</think>")
    tokenizer = load_tokenizer(folder, TASK, arguments={"enable_thinking": False})
    assert shown(tokenizer).endswith("<think></think>")
    tokenizer.save_pretrained(tmp_path / "out")
    assert shown(load_tokenizer(str(tmp_path / "out"))) == shown(tokenizer)
    assert own_template(tokenizer.chat_template, TASK) is not None


@pytest.mark.parametrize("task", ["Rewrite: {query}", "Rewrite ( {query} )", "{query}"])
def test_a_token_that_begins_with_a_space_is_none_behind_one(saved: Callable[..., str], task: str) -> None:
    folder = saved(PLAIN)
    tokenizer = load_chat_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [" [go]", "[stop]  ", " [both] "]})
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder, task)
    special = set(tokenizer.convert_tokens_to_ids([" [go]", "[stop]  ", " [both] "]))
    for query in ("[go]", " [go]", "x [go] y", "[stop]", "[stop]  ", "[both]", " [both] ", "  [go][stop]  "):
        assert not special & set(prompt_ids(tokenizer, query)), query
    assert len(special & set(tokenizer.encode("x [go] [both] [stop]  "))) == 3


@pytest.mark.parametrize(
    "task", ["Rewrite <{query}>", "Rewrite <|{query}", "Rewrite {query}end|>", "{query}|>"]
)
def test_no_query_completes_a_control_token_of_the_text_around_it(
    saved: Callable[..., str], task: str
) -> None:
    with pytest.raises(PromptError, match="could complete it: put a space"):
        load_tokenizer(saved(PLAIN), task)
    assert load_tokenizer(saved(PLAIN), task.replace("{query}", " {query} "))


def test_a_checkpoint_folded_by_an_earlier_version_goes_on(saved: Callable[..., str]) -> None:
    earlier = (
        "{#- vpo_ray: the task prompt is part of this template -#}"
        "{%- set vpo_query = (messages | selectattr('role', 'equalto', 'user') | list | last).content -%}"
        "{%- set messages = [{'role': 'user', 'content': 'Do ' ~ vpo_query ~ ' now'}] -%}" + PLAIN
    )
    assert is_folded(earlier)
    tokenizer = load_tokenizer(saved(earlier), "Do {query} now")
    assert "Do a cat now" in shown(tokenizer, "a cat")
    assert tokenizer.decode(end_of_turn(tokenizer, "Do {query} now")) == "<|end|>"
    assert own_template(earlier, "Do {query}") is None


ASK = """
import json, sys
from vllm import LLM, SamplingParams

engine = LLM(sys.argv[1], enforce_eager=True, max_model_len=512, dtype="float32")
for content in ("a cat", [{"type": "text", "text": "a cat"}]):
    for form in ("auto", "string", "openai"):
        (answer,) = engine.chat(
            [{"role": "user", "content": content}], SamplingParams(max_tokens=1),
            chat_template_content_format=form, use_tqdm=False,
        )
        print("ids", json.dumps(answer.prompt_token_ids))
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("form", [named(default=PLAIN, tool_use="x"), PARTS])
def test_vllm_reads_the_folded_default_of_what_training_leaves(
    saved: Callable[..., str], tmp_path: Path, form: Any
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = load_tokenizer(saved(form), TASK)
    tokenizer.save_pretrained(tmp_path / "out")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "out")
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ids ")]
    assert found == [prompt_ids(tokenizer, "a cat")] * 6, done.stderr[-2000:]
