import json
from pathlib import Path

import pytest
import torch

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.prompts.policy_prompt import prompt_ids, read_prompt
from vpo_ray.world import tiny


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tiny.DATA / name).read_text("utf-8").splitlines()]


def test_policy_and_judge_load_as_llama_with_different_weights(tiny_models: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, judge = (AutoModelForCausalLM.from_pretrained(tiny_models / name) for name in ("policy", "judge"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "policy")
    assert policy.config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id
    assert len(tokenizer) <= policy.config.vocab_size
    assert tokenizer.pad_token_id not in (None, *policy.config.eos_token_id)
    assert not torch.equal(policy.lm_head.weight, judge.lm_head.weight)


def test_tokenizer_gives_every_example_back(tiny_models: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_models / "policy"), read_prompt("builtin:policy"))
    for row in rows("queries.jsonl"):
        ids = tokenizer.encode(row["query"], add_special_tokens=False)
        assert tokenizer.decode(ids) == row["query"]
        assert prompt_ids(tokenizer, row["query"])[0] == tokenizer.bos_token_id


def test_making_again_keeps_what_is_complete_and_remakes_what_is_not(tmp_path: Path) -> None:
    tiny.make_reward(tmp_path)
    weights = tmp_path / "model.safetensors"
    first, written = weights.read_bytes(), weights.stat().st_mtime_ns
    tiny.make_reward(tmp_path)
    assert weights.stat().st_mtime_ns == written
    (tmp_path / "tiny.json").unlink()
    weights.write_bytes(b"half")
    state = torch.get_rng_state()
    tiny.make_reward(tmp_path)
    assert weights.read_bytes() == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.engine
def test_video_depends_on_the_prompt_and_on_nothing_else(tiny_models: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny_models / "video")
    pipeline.set_progress_bar_config(disable=True)

    def frames(prompt: str) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        size = {"height": 64, "width": 96, "num_frames": 9}
        return pipeline(prompt, **size, num_inference_steps=3, generator=noise, output_type="pt").frames[0]

    cat, dog = frames("a cat on a windowsill"), frames("a dog in the snow at night")
    assert tuple(cat.shape) == (9, 3, 64, 96)
    assert torch.equal(cat, frames("a cat on a windowsill"))
    assert (cat - dog).abs().mean() * 255 > 5


def test_examples_are_varied_queries_and_plain_regular_prompts() -> None:
    queries = [row["query"] for row in rows("queries.jsonl")]
    assert len(set(queries)) == len(queries) >= 60
    assert any(len(q.split()) > 150 for q in queries)
    assert any("\n" in q for q in queries)
    assert any("<|eot_id|>" in q for q in queries)
    assert sum(not q.isascii() for q in queries) >= 8
    pairs = rows("sft.jsonl")
    assert len(pairs) >= 30
    assert all(35 <= len(p["prompt"].split()) <= 60 and p["prompt"].isascii() for p in pairs)
    assert not {p["query"] for p in pairs} & set(queries)


def test_a_checkpoint_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(tiny.LARGEST + 1)
    with pytest.raises(tiny.TinyError, match=r"holds model\.safetensors"):
        tiny.make_policy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
