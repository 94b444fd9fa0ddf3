"""Feedback from end to end: answers of a real engine, what their users say, the data made of it, its end."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from vpo_ray.cli import main
from vpo_ray.records import PAIR
from vpo_ray.serve.keys import make_key
from vpo_ray.storage.feedback_tables import FeedbackTables
from vpo_ray.storage.tables import Table

NAMES = {
    "studio": "feedback=yes",
    "other": "feedback=yes",
    "flood": "feedback=yes requests_per_minute=4",
    "silent": "",
}


class Endpoint:
    """An endpoint that keeps feedback, and its callers."""

    def __init__(self, endpoint: Callable[..., str], folder: Path) -> None:
        made = {name: make_key(name) for name in NAMES}
        lines = "".join(f"{line} {NAMES[name]}\n" for name, (_, line) in made.items())
        (folder / "keys").write_text(lines, "utf-8")
        self.store = folder / "store"
        self.clients = {
            name: httpx.Client(headers={"Authorization": f"Bearer {key}"}) for name, (key, _) in made.items()
        }
        self.where = endpoint("told", keys=str(folder / "keys"), feedback={"store": str(self.store)})

    def ask(self, name: str, query: str, n: int = 1) -> dict[str, Any]:
        body = {"query": query, "n": n, "seed": 3}
        reply = self.clients[name].post(f"{self.where}/optimize", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def say(self, name: str, id: str | None, **said: Any) -> httpx.Response:
        return self.clients[name].post(f"{self.where}/feedback", json={"id": id, **said})


def text_of(folder: Path) -> str:
    """All that the tables and files under a folder hold."""
    rows = [Table(str(folder / "pairs"), PAIR, "pair_id").rows()] if (folder / "pairs").exists() else []
    if (folder / "answers").exists():
        tables = FeedbackTables(str(folder))
        rows += [tables.answers.rows(), tables.opinions.rows()]
    files = [path.read_text("utf-8") for path in folder.glob("*.json*")]
    return json.dumps([list(some) for some in rows]) + "".join(files)


@pytest.mark.ray
@pytest.mark.engine
def test_what_users_say_becomes_data_until_they_take_it_back(
    endpoint: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray import serve

    there = Endpoint(endpoint, tmp_path)
    answer, kite = there.ask("studio", "a red ball", n=3), there.ask("other", "a blue kite")
    id, other = answer["id"], kite["id"]
    for said in (
        {"rating": "up"},
        {"chosen": len(answer["alternatives"])},
        {"edited": "A red ball rolls over wet grass.", "comment": "shorter"},
    ):
        assert there.say("studio", id, **said).status_code == 204
    assert there.say("other", other, edited="A blue kite climbs.").status_code == 204
    # A forged id, a part of one, another key's, and a key whose owner has not allowed it.
    mark = id.partition(".")[2]
    for name, given in (
        ("studio", f"{'0' * 32}.{mark}"),
        ("studio", id[:-1]),
        ("other", id),
        ("studio", other),
    ):
        refused = there.say(name, given, rating="down")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "answer_not_found")
    assert there.ask("silent", "a secret plan")["id"] is None
    assert there.say("silent", id, rating="down").json()["error"]["code"] == "feedback_not_allowed"
    # A flood is limited as prompts are: one answer and three opinions, and no more in this minute.
    flood = there.ask("flood", "a grey wave")["id"]
    replies = [there.say("flood", flood, comment=f"comment {number}") for number in range(12)]
    counted = Counter(reply.status_code for reply in replies)
    assert 3 <= counted[204] <= 6
    assert counted[204] + counted[429] == 12
    assert all(int(reply.headers["Retry-After"]) > 0 for reply in replies if reply.status_code == 429)

    # A replica that ends in order writes what it still holds.
    serve.delete("told")
    tables = FeedbackTables(str(there.store))
    assert (tables.answers.count(), tables.opinions.count()) == (3, 4 + counted[204])
    assert "secret plan" not in text_of(there.store)
    data = tmp_path / "data"
    assert main(["collect", str(there.store), "--to", str(data), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["answers"], figures["queries"], figures["left_out"]) == (3, 3, {})
    assert list(figures["checkpoints"]) == [answer["system_fingerprint"]]
    pairs = list(Table(str(data / "pairs"), PAIR, "pair_id").rows())
    candidates = [answer["prompt"], *answer["alternatives"]]
    assert {(pair["query"], pair["chosen"], pair["rejected"]) for pair in pairs} == {
        ("a red ball", "A red ball rolls over wet grass.", answer["prompt"]),
        *(("a red ball", candidates[-1], rest) for rest in candidates[:-1]),
        (
            "a blue kite",
            "A blue kite climbs.",
            next(iter(p["rejected"] for p in pairs if "kite" in p["query"])),
        ),
    }

    # A key takes back everything, a caller one answer: gone from the tables and from what was made of them.
    forget = ["forget", str(there.store), "--collected", str(data)]
    assert main([*forget, "--key", "other"]) == 0
    assert main([*forget, "--answer", id]) == 0
    for gone in ("blue kite", "red ball", "shorter", id.partition(".")[0], other.partition(".")[0]):
        assert gone not in text_of(there.store)
        assert gone not in text_of(data)
    assert "grey wave" in text_of(there.store)
    assert "grey wave" in text_of(data)
    assert not list(Table(str(data / "pairs"), PAIR, "pair_id").rows())
