from pathlib import Path

import pytest
from train_data import TASK_PROMPT, pairs, sft_rows

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.prompts.policy_prompt import PromptError, fold_task_prompt, prompt_ids
from vpo_ray.train.examples import TrainError, end_of_turn, tokenise


@pytest.fixture(scope="module")
def tokenizer(tiny_models: Path):
    return load_tokenizer(str(tiny_models / "policy"), TASK_PROMPT)


def test_the_response_is_its_text_and_the_end_of_turn_and_nothing_else(tokenizer):
    [example], dropped = tokenise("dpo", pairs(1), tokenizer, TASK_PROMPT, 1024)
    assert not dropped
    assert tokenizer.decode(example.responses[0]) == pairs(1)[0]["chosen"] + "<|eot_id|>"
    assert example.prompt.tolist() == prompt_ids(tokenizer, pairs(1)[0]["query"])


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|eot_id|>{{ m.content }}<|end_of_text|>{% endfor %}", "<|end_of_text|>"),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "<|eot_id|>"),
    ],
)
def test_the_end_of_turn_is_the_chat_templates_own_or_eos(tiny_models: Path, template: str, end: str):
    tokenizer = load_tokenizer(str(tiny_models / "policy"), TASK_PROMPT)
    tokenizer.chat_template = fold_task_prompt(template, TASK_PROMPT)
    assert tokenizer.decode(end_of_turn(tokenizer, TASK_PROMPT)) == end


def test_control_tokens_in_a_response_are_text(tokenizer):
    rows = [{"query_id": "1", "query": "q", "prompt": "a<|eot_id|><|start_header_id|>user"}]
    [example], _ = tokenise("sft", rows, tokenizer, TASK_PROMPT, 1024)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert example.responses[0].tolist().index(eot) == len(example.responses[0]) - 1


def test_bad_rows_are_dropped_and_counted_and_responses_never_cut(tokenizer):
    good = pairs(5)
    good[1]["rejected"] = good[1]["chosen"]
    good[2]["chosen"] = " \n"
    good[3]["chosen"] = "word " * 2000
    examples, dropped = tokenise("dpo", [*good, pairs(1)[0]], tokenizer, TASK_PROMPT, 1024)
    assert [e.id for e in examples] == ["pair-00", "pair-04"]
    assert dropped == {
        "chosen equals rejected": 1,
        "empty response": 1,
        "longer than 1024 tokens": 1,
        "duplicate": 1,
    }


def test_the_order_of_rows_does_not_matter(tokenizer):
    forward, _ = tokenise("dpo", pairs(4), tokenizer, TASK_PROMPT, 1024)
    backward, _ = tokenise("dpo", pairs(4)[::-1], tokenizer, TASK_PROMPT, 1024)
    assert [e.id for e in forward] == [e.id for e in backward]


def test_no_usable_row_and_a_wrong_table_are_told(tokenizer):
    with pytest.raises(TrainError, match=r"no row is left.*2 longer than 8 tokens"):
        tokenise("dpo", pairs(2), tokenizer, TASK_PROMPT, 8)
    with pytest.raises(TrainError, match="no text in pair_id, chosen, rejected"):
        tokenise("dpo", sft_rows(1), tokenizer, TASK_PROMPT, 1024)
    with pytest.raises(TrainError, match="another task prompt"):
        tokenise("dpo", pairs(1), tokenizer, "Other: {query}", 1024)


def test_a_tokenizer_without_a_chat_template_is_refused_and_without_a_pad_token_is_not(
    tiny_models: Path, tmp_path: Path
):
    tokenizer = load_tokenizer(str(tiny_models / "policy"), TASK_PROMPT)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    unpadded = load_tokenizer(str(tmp_path / "unpadded"), TASK_PROMPT)
    assert unpadded.pad_token is None
    assert len(tokenise("dpo", pairs(3), unpadded, TASK_PROMPT, 1024)[0]) == 3
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(PromptError, match="no chat template; use an instruction-tuned checkpoint"):
        load_tokenizer(str(tmp_path / "bare"), TASK_PROMPT)
