"""The world's judge: what it is taught, and how well the one that is shipped has learnt it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vpo_ray.recipe import Judge
from vpo_ray.stages.judge import parse_judgement, refined_fault
from vpo_ray.world import judge_texts, lexicon
from vpo_ray.world.make import WEIGHTS
from vpo_ray.world.scene import scenes
from vpo_ray.world.train_judge import make_tokenizer, measure, train

FOLDER = WEIGHTS / "judge"
FIGURES = json.loads((WEIGHTS / "figures.json").read_text("utf-8"))["judge"]


def test_what_it_is_taught_is_the_lexicon_s_and_within_the_stage_s_limits() -> None:
    limits, rng, possible = Judge(model="judge"), np.random.default_rng(3), scenes(held_out=False)
    verdicts, looks = [], set()
    for _ in range(400):
        query, prompt = judge_texts.pair(possible, rng)
        (_, answer), *rest = judge_texts.examples(query, prompt)
        found = parse_judgement(answer)
        verdicts.append(found.verdict)
        assert found.verdict == lexicon.verdict(query, prompt)
        assert [detail.split()[0] for detail in found.missing] == lexicon.broken(lexicon.read(query), prompt)
        assert len(found.critique) < limits.critique_max_chars
        assert len(found.missing) <= limits.max_details
        assert bool(rest) == (found.verdict != "aligned")
        for _, refined in rest:
            text = json.loads(refined)["prompt"]
            looks.add(lexicon.read(text).get("look"))
            assert lexicon.verdict(query, text) == "aligned"
            assert refined_fault(text, prompt, limits.word_limit) is None
    assert looks == {"clear", "faded", None}
    assert min(map(verdicts.count, ("aligned", "imprecise", "unsafe", "refusal"))) > 8


def test_a_repair_keeps_what_the_prompt_says_of_what_is_not_asked() -> None:
    text = judge_texts.repaired("red ball", "a tiny blue ball at sea, blurry, killing people")
    said = {"colour": "red", "shape": "ball", "size": "small", "place": "sea", "look": "faded"}
    assert lexicon.read(text).items() >= said.items()
    assert not lexicon.is_unsafe(text)


@pytest.mark.engine
def test_words_of_the_world_are_one_token_each_and_any_text_comes_back() -> None:
    tokenizer = make_tokenizer(["a text"])
    for word in lexicon.VOCABULARY:
        assert len(tokenizer.tokenize(f" {word}")) == 1
    text = 'naïve 猫 "ballroom" {"critique": "refusal no\\nred'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.engine
def test_the_shipped_judge_agrees_with_the_lexicon_as_its_figures_say() -> None:
    found = measure(FOLDER, count=60, seed=9)
    # Two standard deviations of a share of 60.
    assert found["agreement"] >= FIGURES["agreement"] - 0.06
    assert found["repaired"] >= FIGURES["repaired"] - 0.1


@pytest.mark.engine
@pytest.mark.slow
def test_a_hundred_steps_lower_the_loss(tmp_path: Path) -> None:
    found = train(tmp_path / "judge", steps=100, pairs=2000, measured=10)
    first, last = found["loss"]
    assert last < first / 3
    assert {"config.json", "model.safetensors", "critique.txt", "refine.txt"} <= {
        path.name for path in (tmp_path / "judge").iterdir()
    }


STAGE = """
import asyncio, json, sys
import numpy as np
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vpo_ray.engines.chat import Answer
from vpo_ray.recipe import Judge
from vpo_ray.stages.judge import Judging
from vpo_ray.world import judge_texts, lexicon
from vpo_ray.world.scene import scenes

folder = sys.argv[1]
engine = LLM(folder, enforce_eager=True, max_model_len=1024, dtype="float32", structured_outputs_config={
    "backend": "xgrammar", "disable_any_whitespace": True})

class Chat:
    async def complete(self, messages, sampling, schema=None):
        params = SamplingParams(temperature=sampling.temperature, max_tokens=sampling.max_tokens,
                                structured_outputs=StructuredOutputsParams(json=schema))
        (answer,) = engine.chat(messages, params, use_tqdm=False)
        made = answer.outputs[0]
        return Answer(made.text, made.finish_reason, len(answer.prompt_token_ids), len(made.token_ids))

stage = Judging(Judge(model=folder, critique_prompt=f"{folder}/critique.txt", max_tokens=256,
                      refine_prompt=f"{folder}/refine.txt"))
rng, possible = np.random.default_rng(9), scenes(held_out=True)
for _ in range(int(sys.argv[2])):
    query, prompt = judge_texts.pair(possible, rng)
    row = asyncio.run(stage.review(query, prompt, "id", Chat()))
    row |= {"query": query, "prompt": prompt, "truth": lexicon.verdict(query, prompt)}
    print("row", json.dumps(row))
"""


@pytest.mark.engine
@pytest.mark.slow
def test_the_judge_stage_reads_its_answers_from_vllm(tmp_path: Path) -> None:
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STAGE, str(FOLDER), "40"],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("row ")]
    assert len(rows) == 40, done.stderr[-2000:]
    agreed = [row["verdict"] == row["truth"] for row in rows]
    assert sum(agreed) / 40 >= FIGURES["agreement"] - 0.08
    refined = [row for row in rows if row.get("refined_prompt")]
    aligned = [lexicon.verdict(row["query"], row["refined_prompt"]) == "aligned" for row in refined]
    assert sum(aligned) / len(refined) >= FIGURES["repaired"] - 0.15
