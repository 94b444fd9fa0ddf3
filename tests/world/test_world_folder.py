"""What `vpo world` writes beside the policy: shipped models, and the texts of users and teacher."""

import json
from pathlib import Path

import pytest

from vpo_ray.files.text_files import read_lines
from vpo_ray.world import lexicon, make
from vpo_ray.world.make import make_world, write_texts


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in read_lines(path)]


def test_texts_are_the_same_every_time_and_no_query_is_twice(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    write_texts(tmp_path)
    write_texts(tmp_path / "again")
    found = []
    for name, count in (("sft", make.SFT), ("queries", make.QUERIES), ("held_out", make.HELD_OUT)):
        path = tmp_path / f"{name}.jsonl"
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert len(rows(path)) == count
        found += [row["query"] for row in rows(path)]
    assert len(set(found)) == len(found)


def test_the_teacher_keeps_what_is_named_and_is_indifferent_to_the_look(tmp_path: Path) -> None:
    write_texts(tmp_path)
    taught = rows(tmp_path / "sft.jsonl")
    assert {lexicon.verdict(row["query"], row["prompt"]) for row in taught} == {"aligned"}
    assert any(lexicon.is_unsafe(row["query"]) for row in taught)
    looks = [lexicon.read(row["prompt"]).get("look") for row in taught]
    assert all(looks.count(look) >= make.SFT // 5 for look in ("clear", "faded", None))


def test_shipped_models_are_copied_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "weights/video/vae"
    shipped.mkdir(parents=True)
    (shipped / "config.json").write_text("{}", "utf-8")
    monkeypatch.setattr(make, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(make, "make_smollm2", lambda folder: folder.mkdir(parents=True))
    make_world(tmp_path / "world")
    assert (tmp_path / "world/video/vae/config.json").read_text("utf-8") == "{}"
    (shipped / "config.json").write_text("[]", "utf-8")
    (tmp_path / "world/policy").rmdir()
    make_world(tmp_path / "world")
    assert (tmp_path / "world/video/vae/config.json").read_text("utf-8") == "[]"
