import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray import recipe
from vpo_ray.engines.reward.checklist import ChecklistError, LoadedChecklist, Question, load_checklist

VISIONREWARD = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "visionreward"
RANGES = {
    "Alignment": "1-4",
    "Composition": "5-6",
    "Stability": "7-10, 36-37, 44-49",
    "Quality": "11-20, 40-43",
    "Preservation": "21-27",
    "Dynamic": "28-35",
    "Fidelity": "38-39, 50-56",
    "Physics": "57-60",
    "Safety": "61-64",
}


def published(folder: Path, questions: str, weights: Any, **options: Any) -> LoadedChecklist:
    (folder / "questions.txt").write_text(questions, "utf-8")
    (folder / "weight.json").write_text(weights if isinstance(weights, str) else json.dumps(weights), "utf-8")
    paths = {"questions": str(folder / "questions.txt"), "weights": str(folder / "weight.json")}
    return load_checklist(recipe.Checklist(**paths, **options))


def ours(folder: Path, questions: Any) -> LoadedChecklist:
    (folder / "checklist.yaml").write_text(yaml.safe_dump({"questions": questions}), "utf-8")
    return load_checklist(recipe.Checklist(file=str(folder / "checklist.yaml")))


def test_the_published_files_are_read_as_they_are() -> None:
    if not VISIONREWARD.is_dir():
        pytest.skip("VisionReward's files are not here")
    questions, weights = VISIONREWARD / "VisionReward_video_qa_select.txt", VISIONREWARD / "weight.json"
    found = load_checklist(recipe.Checklist(questions=str(questions), weights=str(weights)))
    assert len(found.questions) == 29
    assert found.score([True] * 29, "sum01")[0] == pytest.approx(6.2771726, abs=1e-6)
    # The score that a tokenizer without a literal "yes" gives to every video.
    assert found.score([False] * 29, "mean_pm1")[0] == pytest.approx(-0.21645422762093175, abs=1e-12)
    kept = load_checklist(
        recipe.Checklist(questions=str(questions), weights=str(weights), strip_newlines=False)
    )
    assert [q.text.endswith("\n") for q in kept.questions] == [True] * 28 + [False]


def test_dimensions_come_from_ranges(tmp_path: Path) -> None:
    text = "\n".join(f'Is {i} in "[[prompt]]"?' for i in range(64))
    found = published(tmp_path, text, [1] * 64, dimensions=RANGES)
    _, dimensions = found.score([True] * 64, "sum01")
    assert dimensions["Stability"] == 12
    assert sum(dimensions.values()) == 64


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0], {}, "has 1 weights, .* has 2 questions"),
        ([1.0, "0.5"], {}, "weight 2: the weight is '0.5'"),
        ([1.0, True], {}, "weight 2: the weight is True"),
        ("[1.0, NaN]", {}, "weight 2: the weight is nan"),
        ({"a": 1}, {}, "must be a JSON list"),
        ("[1.0,", {}, "not JSON"),
        ([1, 1], {"dimensions": {"a": "1-3"}}, "dimensions.a: '1-3' is no range of questions 1 to 2"),
        ([1, 1], {"dimensions": {"a": "x"}}, "dimensions.a: 'x' is no range"),
        ([1, 1], {"dimensions": {"a": "1"}}, "question 2 is in none"),
        ([1, 1], {"dimensions": {"a": "1-2", "b": "2"}}, "question 2 belongs to a already"),
        ([1, 1], {"dimensions": {"Alignment": "1", "b": "2"}}, r"no \[\[prompt\]\] slot"),
    ],
)
def test_published_files_that_do_not_fit_are_refused(
    tmp_path: Path, weights: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ChecklistError, match=message):
        published(tmp_path, "Is it bright?\nIs it sharp?", weights, **options)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "no questions"),
        ("Is it bright?", "needs a list"),
        (["Is it bright?"], "question 1: write"),
        ([{"question": "Is it bright?"}], "question 1: the weight is None"),
        ([{"question": "Is it bright?", "weight": float("inf")}], "the weight is inf"),
        ([{"question": " ", "weight": 1}], "its text is ' '"),
        ([{"question": "Is it?", "weight": 1, "wieght": 2}], "wieght"),
        ([{"question": "Is it?", "weight": 1, "dimension": 3}], "its dimension is 3"),
        ([{"question": "As asked?", "weight": 1, "dimension": "alignment"}], r"no \[\[prompt\]\] slot"),
    ],
)
def test_a_checklist_of_ours_that_does_not_fit_is_refused(
    tmp_path: Path, questions: Any, message: str
) -> None:
    with pytest.raises(ChecklistError, match=message):
        ours(tmp_path, questions)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChecklistError, match=r"absent\.yaml"):
        load_checklist(recipe.Checklist(file=str(tmp_path / "absent.yaml")))


def test_a_slot_in_the_query_is_not_filled_again() -> None:
    question = Question('Is "[[prompt]]" there?', 1, None)
    assert question.ask("a [[prompt]] cat") == 'Is "a [[prompt]] cat" there?'


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.booleans(), st.sampled_from("abc")), min_size=1, max_size=70)
)
def test_the_conventions_relate_as_documented(entries: list[tuple[float, bool, str]]) -> None:
    checklist = LoadedChecklist(tuple(Question("Is it?", weight, name) for weight, _, name in entries))
    yes = [answer for _, answer, _ in entries]
    total, dimensions = checklist.score(yes, "sum01")
    mean, mean_dimensions = checklist.score(yes, "mean_pm1")
    weights = sum(weight for weight, _, _ in entries)
    assert mean == pytest.approx((2 * total - weights) / len(entries), abs=1e-9)
    assert total == pytest.approx(sum(dimensions.values()), abs=1e-9)
    assert mean == pytest.approx(sum(mean_dimensions.values()), abs=1e-9)
