"""Rewards on prompts alone, against stock transformers and plain numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vpo_ray.engines.reward import PromptReward, RewardError, Scored, build
from vpo_ray.plan import PlanError, check_recipe
from vpo_ray.recipe import RecipeError, Reward, load
from vpo_ray.recipe.plugins import PluginError
from vpo_ray.records import FEEDBACK, table
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.videos import VideoStore

TINY = str(Path(__file__).parents[3] / "jobs/recipes/tiny.yaml")
WORDS = ["a", "cat", "dog", "sits", "on", "the", "red", "mat", "in", "sun", "##s", "##ting"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder with random weights, as sentence-transformers saves one."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(5)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}', "utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 16,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling), "utf-8")
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    return folder


def text_reward(**options: Any) -> PromptReward:
    model = build(Reward.model_validate({"kind": "text", "options": options, "device": "cpu"}))
    assert isinstance(model, PromptReward)
    return model


def dimensions(result: Scored | Exception) -> dict[str, float]:
    assert isinstance(result, Scored), result
    return result.dimensions


def cosine(folder: Path, one: str, other: str) -> float:
    """By stock transformers and numpy: the mean over tokens, cut at 8 of them."""
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    vectors = []
    for text in (one, other):
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=8)
        with torch.no_grad():
            vectors.append(model(**tokens).last_hidden_state[0].numpy().mean(0))
    a, b = vectors
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_similarity_is_the_cosine_of_means_over_tokens(encoder: Path) -> None:
    pairs = [
        ("a cat sits", "a cat"),
        ("dog on the red mat in the sun on a red mat", "a cat"),
        ("妖精", "dog"),
    ]
    reward = text_reward(encoder=str(encoder))
    results = reward.score_prompts([p for p, _ in pairs], [q for _, q in pairs])
    for (prompt, query), result in zip(pairs, results, strict=True):
        assert dimensions(result)["similarity"] == pytest.approx(cosine(encoder, prompt, query), abs=1e-5)
    alone = [reward.score_prompts([p], [q])[0] for p, q in reversed(pairs)]
    assert alone[::-1] == results, "whatever stands beside it"
    assert dimensions(reward.score_prompts(["a cat"], ["a cat"])[0])["similarity"] == pytest.approx(1)


def test_a_prefix_stands_before_both_texts(encoder: Path) -> None:
    reward = text_reward(encoder=str(encoder), prefix="the ")
    found = dimensions(reward.score_prompts(["cat sits"], ["dog"])[0])
    assert found["similarity"] == pytest.approx(cosine(encoder, "the cat sits", "the dog"), abs=1e-5)


def test_an_encoder_that_is_made_otherwise_is_refused(encoder: Path, tmp_path: Path) -> None:
    import shutil

    for change, says in (
        ("1_Pooling/config.json", "pools by pooling_mode_cls_token"),
        ("modules.json", "has the module Dense"),
        ("model.safetensors", "cannot be loaded"),
    ):
        folder = tmp_path / says[:4]
        shutil.copytree(encoder, folder)
        if change == "model.safetensors":
            (folder / change).unlink()
        else:
            new: Any = [{"type": "sentence_transformers.models.Dense"}]
            new = new if change == "modules.json" else {"pooling_mode_cls_token": True}
            (folder / change).write_text(json.dumps(new), "utf-8")
        with pytest.raises(PluginError, match=says):
            text_reward(encoder=str(folder))


def test_length_and_required_words(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat\nred mat\n", "utf-8")
    reward = text_reward(words=[4, 8], required=str(tmp_path / "words.txt"))
    cases = {
        ("a cat sits still", "a Cat"): (1.0, 1.0),
        ("a dog", "a cat on a red mat"): (0.5, 0.0),
        ("one cat " * 8, "a cat, a red mat"): (0.5, 0.5),
        ("猫坐在垫子上", "a dog"): (1.0, 1.0),  # six words, and nothing that has to be kept
    }
    results = reward.score_prompts([p for p, _ in cases], [q for _, q in cases])
    for found, (length, required) in zip(results, cases.values(), strict=True):
        assert dimensions(found) == {"length": length, "required": required}
        assert isinstance(found, Scored)
        assert found.score == pytest.approx((length + required) / 2)
    assert isinstance(reward.score_prompts([" \n"], ["a cat"])[0], RewardError)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("{}", "give at least one of"),
        ("{words: [9, 3]}", "write [least, most]"),
        ("{words: [0, 3]}", "greater than 0"),
    ],
)
def test_options_without_sense_are_refused(options: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(TINY, [f"reward={{kind: text, options: {options}}}"])
    assert says in str(refused.value)


def test_a_plan_checks_the_encoder_and_the_words(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n", "utf-8")
    tree = f"{{kind: text, options: {{encoder: /not/here, required: {tmp_path}/empty.txt}}}}"
    with pytest.raises(PlanError) as refused:
        check_recipe(load(TINY, [f"more_rewards.kept={tree}"]))
    assert "more_rewards.kept.options.encoder: no such folder: /not/here" in str(refused.value)
    assert "empty.txt holds no word" in str(refused.value)


def test_as_one_of_the_rewards_it_scores_the_prompt_of_a_video(tmp_path: Path) -> None:
    store = VideoStore(tmp_path / "videos")
    for i in range(2):
        store.write(f"video{i}", b"bytes", {})
    reward = Reward.model_validate({"kind": "text", "options": {"words": [4, 8]}, "batch_size": 2})
    base = {"query_id": "q", "query": "a cat", "seed": 1}
    prompts = ["a cat", "a cat sits on a mat"]
    rows = [{**base, "candidate_id": str(k), "k": k, "prompt": text, "video_key": f"video{k}"}
            for k, text in enumerate(prompts)]  # fmt: skip
    done = Scorer(reward, store.folder.uri, {"more": reward})(rows)
    assert [row["score"] for row in done] == [0.5, 1.0]
    assert [row["more_rewards"][0]["dimensions"] for row in done] == [
        [{"name": "length", "score": 0.5}],
        [{"name": "length", "score": 1.0}],
    ]
    assert table(done, FEEDBACK).num_rows == 2
