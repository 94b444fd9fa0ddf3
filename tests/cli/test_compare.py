"""`vpo compare`: pages of pairs that carry no policy's name, and votes that come back with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import sample, save

from vpo_ray import cli
from vpo_ray.evaluation import people
from vpo_ray.evaluation.people import BlindPair
from vpo_ray.evaluation.samples import COMPARISON
from vpo_ray.files.folder import Folder
from vpo_ray.records import table

QUERIES = [f"query number {number}" for number in range(10)]


@pytest.fixture
def evaluation(tmp_path: Path) -> Folder:
    return save(tmp_path / "run", [sample(q, p) for q in QUERIES for p in ("query", "sft", "dpo")])


@pytest.fixture
def vpo(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: Any) -> tuple[int, str, str]:
        status = cli.main(["compare", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def pairs(evaluation: Folder) -> list[BlindPair]:
    return people.blind_pairs(people.samples_to_compare(evaluation), "prompt", ["sft", "dpo"])[0]


def side(pair: BlindPair, policy: str) -> str:
    return "left" if pair.left["policy"] == policy else "right"


def votes(path: Path, rater: Any, given: Any) -> Path:
    listed = [{"pair": pair, "vote": vote} for pair, vote in given]
    path.write_text(json.dumps({"page": "p", "rater": rater, "votes": listed}), "utf-8")
    return path


def test_a_page_is_written_and_what_is_left_out_is_said(evaluation: Folder, tmp_path: Path, vpo: Any) -> None:
    to = ("--what", "prompt", "--to", tmp_path / "to", "--limit", 4, "--set", "eval")
    status, out, _ = vpo("page", evaluation.uri, "--policies", "sft, dpo", *to)
    assert (status, out) == (0, f"compare: 4 pairs, see {tmp_path}/to/index.html\n")
    status, _, err = vpo("page", evaluation.uri, "--policies", "sft,none", *to)
    assert status == 2
    assert "no policy 'none', but dpo, query, sft" in err


def test_votes_come_back_with_their_policies(evaluation: Folder, tmp_path: Path, vpo: Any) -> None:
    shown = pairs(evaluation)
    dpo = [(pair.pair_id, side(pair, "dpo")) for pair in shown[:6]]
    ann = votes(tmp_path / "ann.json", " Ann ", [*dpo, (shown[6].pair_id, "tie"), ("f" * 32, "left")])
    bob = votes(tmp_path / "bob.json", "Bob", [*dpo[:3], (shown[3].pair_id, side(shown[3], "sft"))])
    status, out, _ = vpo("votes", ann, bob, "--samples", evaluation.uri)
    assert status == 0
    assert "eval, prompts: dpo better 9, sft better 1, tie 1 (7 pairs, 2 raters)" in out
    assert "agreement of raters on 4 pairs: 75% of two votes are equal, Krippendorff's alpha 0.00" in out
    assert "left out: 1 votes, on a pair that these samples do not have" in out
    rows = list(people.votes_table(evaluation).rows())
    assert table(rows, COMPARISON).num_rows == 11
    assert {row["by"] for row in rows} == {"Ann", "Bob"}
    for row in rows:
        winner = row[row["answer"]] if row["answer"] != "tie" else "tie"
        expected = {"Ann": {"dpo", "tie"}, "Bob": {"dpo", "sft"}}
        assert {row["a"], row["b"]} == {"sft", "dpo"}
        assert winner in expected[row["by"]]


def test_votes_read_again_are_counted_once_and_later_ones_count(
    evaluation: Folder, tmp_path: Path, vpo: Any
) -> None:
    shown = pairs(evaluation)
    early = votes(tmp_path / "1.json", "Ann", [(pair.pair_id, side(pair, "dpo")) for pair in shown[:5]])
    late = [(shown[0].pair_id, "tie"), *((pair.pair_id, side(pair, "dpo")) for pair in shown[1:8])]
    late = votes(tmp_path / "2.json", "Ann", late)
    vpo("votes", early, "--samples", evaluation.uri)
    for files in ([late], [early, late]):
        status, out, _ = vpo("votes", *files, "--samples", evaluation.uri)
        assert status == 0
        assert "dpo better 7, sft better 0, tie 1 (8 pairs, 1 rater)" in out
        assert "no pair has votes of two" in out
    assert "left out: 4 votes, given again, the same" in out
    assert "left out: 1 votes, given again, and changed" in out
    assert people.votes_table(evaluation).count() == 8


def test_a_changed_vote_of_an_earlier_command_is_said(evaluation: Folder, tmp_path: Path, vpo: Any) -> None:
    pair = pairs(evaluation)[0]
    for vote, changed in (("left", False), ("right", True), ("right", False)):
        _, out, _ = vpo(
            "votes", votes(tmp_path / "v.json", "Ann", [(pair.pair_id, vote)]), "--samples", evaluation.uri
        )
        assert ("1 earlier votes were changed" in out) == changed


def test_votes_of_another_evaluation_are_refused(evaluation: Folder, tmp_path: Path, vpo: Any) -> None:
    made_again = [sample(q, p, prompt=f"{p}: {q}") for q in QUERIES for p in ("sft", "dpo")]
    other = save(tmp_path / "other", made_again)
    file = votes(tmp_path / "v.json", "Ann", [(pair.pair_id, "tie") for pair in pairs(other)])
    status, _, err = vpo("votes", file, "--samples", evaluation.uri)
    assert status == 2
    assert "none of its 10 votes is on a pair of these samples" in err
    assert not people.votes_table(evaluation).files()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", 'no list "votes"'),
        (b'{"rater": "Ann", "votes": {}}', 'no list "votes"'),
        (b'{"votes": []}', '"rater" is not a name'),
        (b'{"rater": " ", "votes": []}', '"rater" is not a name'),
        (b'{"rater": "\\ud800", "votes": []}', '"rater" is not a name'),
        (b'{"rater": ["Ann"], "votes": []}', '"rater" is not a name'),
        (b'{"rater": "Ann", "votes": ["left"]}', "vote 1 is not a pair's id"),
        (b'{"rater": "Ann", "votes": [{"pair": "p", "vote": "up"}]}', "one of left, right, tie"),
        (b'{"rater": "Ann", "votes": [{"pair": "p", "vote": []}]}', "vote 1 is not"),
        (
            b'{"rater": "Ann", "votes": [{"pair": "p", "vote": "left"}, {"pair": "p", "vote": "tie"}]}',
            "the pair p has two votes that differ",
        ),
    ],
)
def test_what_is_no_file_of_votes_is_refused(
    evaluation: Folder, tmp_path: Path, vpo: Any, content: bytes, says: str
) -> None:
    (tmp_path / "v.json").write_bytes(content)
    status, _, err = vpo("votes", tmp_path / "v.json", "--samples", evaluation.uri)
    assert status == 2
    assert says in err
    assert "v.json" in err


def test_files_that_are_not_there_are_named(evaluation: Folder, tmp_path: Path, vpo: Any) -> None:
    status, _, err = vpo("votes", tmp_path / "none.json", "--samples", evaluation.uri)
    assert status == 2
    assert "none.json: No such file" in err
    status, _, err = vpo("votes", votes(tmp_path / "v.json", "Ann", []), "--samples", tmp_path / "nowhere")
    assert status == 2
    assert "has no samples" in err
