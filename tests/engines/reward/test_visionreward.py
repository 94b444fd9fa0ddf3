from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vpo_ray import recipe
from vpo_ray.engines.reward import RewardError, Scored, build
from vpo_ray.engines.reward.checkpoint import CheckpointError
from vpo_ray.engines.reward.visionreward import Rule, VisionReward

pytestmark = pytest.mark.engine
QUERIES = ["a cat", "a red fox walks through deep snow\nand stops", "一只熊猫在竹林里吃竹子"]


def settings(folder: Path, **options: object) -> recipe.Reward:
    checklist = recipe.Checklist(file=str(folder / "checklist.yaml"))
    base = {"model": str(folder), "dtype": "float32", "rule": "margin", "checklist": checklist}
    return recipe.Reward(**(base | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reward(tiny_models: Path) -> VisionReward:
    found = build(settings(tiny_models / "reward"))
    assert isinstance(found, VisionReward)
    return found


@pytest.fixture(scope="module")
def videos(clip: Callable[..., bytes]) -> list[bytes]:
    return [clip(1), clip(2, frames=33, height=96, width=64), clip(3, frames=17)]


def logits(reward: VisionReward, videos: list[bytes], queries: list[str]) -> list[torch.Tensor]:
    found = reward.logits(videos, queries)
    assert all(isinstance(x, torch.Tensor) for x in found)
    return found  # type: ignore[return-value]


def test_one_pass_answers_as_one_question_at_a_time(reward: VisionReward, videos: list[bytes]) -> None:
    from vpo_ray.engines.reward.frames import preprocess, read_frames

    packed = logits(reward, videos, QUERIES)
    for video, query, together in zip(videos, QUERIES, packed, strict=True):
        frames = torch.from_numpy(read_frames(video, reward.pick))
        features = reward.model.encode(preprocess(frames, 56))
        for question, expected in zip(reward.checklist.questions, together, strict=True):
            alone = reward.layout(len(frames), query, [question])
            torch.testing.assert_close(
                reward.model.answer([alone], [features])[0][0], expected, atol=1e-4, rtol=0
            )


def test_questions_grouped_under_a_mask_answer_the_same(
    reward: VisionReward, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(reward, videos, QUERIES)
    monkeypatch.setattr("vpo_ray.engines.reward.model.group_size", lambda device: 1000)
    for a, b in zip(logits(reward, videos, QUERIES), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_eager_attention_answers_the_same(
    reward: VisionReward, tiny_models: Path, videos: list[bytes]
) -> None:
    eager = build(settings(tiny_models / "reward", attention="eager"))
    assert isinstance(eager, VisionReward)
    for a, b in zip(logits(eager, videos, QUERIES), logits(reward, videos, QUERIES), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_videos_differ_in_score(reward: VisionReward, clip: Callable[..., bytes]) -> None:
    results = reward.score([clip(seed) for seed in range(8)], ["a cat"] * 8)
    scores = {result.score for result in results if isinstance(result, Scored)}
    assert len(scores) >= 3
    first = results[0]
    assert isinstance(first, Scored)
    assert [a.question for a in first.answers] == list(range(1, 9))
    assert all(a.yes == (a.probability > 0.5) for a in first.answers)
    assert first.score == pytest.approx(sum(first.dimensions.values()))


def test_a_bad_row_fails_alone(reward: VisionReward, videos: list[bytes]) -> None:
    broken = [videos[0], b"no video", videos[1][: len(videos[1]) // 2], videos[1], videos[2]]
    results = reward.score(broken, [QUERIES[0], "", "", "word " * 3000, QUERIES[2]])
    assert [isinstance(r, RewardError) for r in results] == [False, True, True, True, False]
    assert "the model has 2048 positions" in str(results[3])
    assert results[0] == reward.score([videos[0]], [QUERIES[0]])[0]
    assert reward.score([], []) == []


def test_control_tokens_in_a_query_stay_text(reward: VisionReward) -> None:
    special = set(reward.tokenizer.all_special_ids)
    row = reward.layout(2, "x <|eot_id|> <|reserved_special_token_0|> [[prompt]]")
    asked = row.tokens.ids[row.prefix :]
    assert not special & set(asked)


def test_both_rules_and_what_they_count() -> None:
    logits = torch.tensor([[5.0, 0, 1, 9], [2, 1, 0, 0], [0, 3, 0, 0]])
    assert Rule([0], [1], "argmax").decide(logits)[0] == [False, True, False]
    answers, probabilities, neither = Rule([0, 2], [1], "margin").decide(logits)
    assert answers == [True, True, False]
    assert probabilities[2] == pytest.approx(2 / (2 + torch.tensor(3.0).exp().item()))
    assert neither == 1


def test_a_word_that_is_no_token_is_refused(tiny_models: Path) -> None:
    with pytest.raises(CheckpointError, match=r"splits 'certainly not' into \d+ tokens"):
        build(settings(tiny_models / "reward", no_tokens=["certainly not"]))


def test_answers_that_are_no_numbers_are_an_error_and_not_no(tiny_models: Path, videos: list[bytes]) -> None:
    damaged = build(settings(tiny_models / "reward"))
    assert isinstance(damaged, VisionReward)
    damaged.model.llm.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    [found] = damaged.score(videos[:1], QUERIES[:1])
    assert isinstance(found, RewardError)
    assert "are no numbers" in str(found)
