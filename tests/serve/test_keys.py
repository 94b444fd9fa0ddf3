"""Who may call: keys are made, found, limited and revoked without a restart."""

import os
from pathlib import Path

import pytest

from vpo_ray.cli import main
from vpo_ray.serve.errors import RequestError
from vpo_ray.serve.keys import ANYONE, Key, KeyFileError, KeyRing, make_key, parse_line
from vpo_ray.serve.limits import Limits


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def status(ring: KeyRing, header: str | None) -> int:
    try:
        ring.find(header)
    except RequestError as error:
        return error.status if error.headers == {"WWW-Authenticate": "Bearer"} else 0
    return 200


def test_a_made_key_is_known_by_its_line_alone(tmp_path: Path) -> None:
    key, line = make_key("web")
    assert key not in line
    assert len(key) > 40
    (tmp_path / "keys").write_text(f"# callers\n\n{line} requests_per_minute=5 scopes=optimize\n")
    found = KeyRing(tmp_path / "keys").find(f"Bearer {key}")
    assert (found.name, found.requests_per_minute, found.concurrency) == ("web", 5, None)
    assert found.scopes == ("optimize",)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer vpo-wrong", "Basic {key}", "{key}", "Bearer \udcff"]
)
def test_who_has_no_key_is_refused(tmp_path: Path, header: str | None) -> None:
    key, line = make_key("web")
    (tmp_path / "keys").write_text(line)
    assert status(KeyRing(tmp_path / "keys"), header and header.format(key=key)) == 401


def test_the_command_prints_a_key_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "mobile.app"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    (tmp_path / "keys").write_text(second.partition(":")[2])
    assert KeyRing(tmp_path / "keys").find(f"bearer {first.split()[-1]}").name == "mobile.app"
    assert main(["key", "two words"]) == 2
    assert "cannot name a key" in capsys.readouterr().err


def test_keys_come_and_go_without_a_restart(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "keys"
    (old, old_line), (new, new_line) = make_key("old"), make_key("new")
    path.write_text(old_line)
    ring = KeyRing(path, clock)
    path.write_text(f"{new_line}\nbroken line\n")
    assert status(ring, f"Bearer {old}") == 200, "not looked at again yet"
    clock.time += 2
    assert (status(ring, f"Bearer {old}"), status(ring, f"Bearer {new}")) == (401, 200)
    path.unlink()
    clock.time += 2
    assert status(ring, f"Bearer {new}") == 401
    path.write_text(old_line)
    clock.time += 2
    assert status(ring, f"Bearer {old}") == 200


def test_a_mounted_secret_is_a_folder_of_keys(tmp_path: Path) -> None:
    """Kubernetes mounts a Secret as links into a hidden folder, which it swaps when the Secret changes."""
    clock = Clock()
    (one, one_line), (two, two_line) = make_key("one"), make_key("two")
    for version, lines in (("..v1", [one_line, two_line]), ("..v2", [two_line])):
        (tmp_path / version).mkdir()
        for number, line in enumerate(lines):
            (tmp_path / version / f"key{number}").write_text(line)
    (tmp_path / "..data").symlink_to("..v1")
    for name in ("key0", "key1"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    ring = KeyRing(tmp_path, clock)
    assert (status(ring, f"Bearer {one}"), status(ring, f"Bearer {two}")) == (200, 200)
    (tmp_path / "..next").symlink_to("..v2")
    os.replace(tmp_path / "..next", tmp_path / "..data")
    (tmp_path / "key1").unlink()
    clock.time += 2
    assert (status(ring, f"Bearer {one}"), status(ring, f"Bearer {two}")) == (401, 200)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("web", "64 hex digits"),
        ("web vpo-in-the-clear", "64 hex digits"),
        ("!web " + "0" * 64, "no name"),
        ("web " + "0" * 64 + " speed=3", "no option"),
        ("web " + "0" * 64 + " concurrency=0", "no option"),
        ("web " + "0" * 64 + " scopes=admin", "no option"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_no_secret(line: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=told) as error:
        parse_line(line)
    assert "in-the-clear" not in str(error.value)
    (tmp_path / "keys").write_text(line)
    with pytest.raises(KeyFileError, match="line 1"):
        KeyRing(tmp_path / "keys")


def test_no_keys_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="does not exist"):
        KeyRing(tmp_path / "keys")
    (tmp_path / "keys").write_text("# nobody\n")
    with pytest.raises(KeyFileError, match="holds no key"):
        KeyRing(tmp_path / "keys")


def refusal(limits: Limits, key: Key = ANYONE) -> str | None:
    try:
        with limits.admit(key):
            return None
    except RequestError as error:
        return error.headers["Retry-After"] if error.status == 429 else "never"


def test_requests_a_minute_are_counted_by_key() -> None:
    clock = Clock()
    limits = Limits(2, None, now=clock)
    assert [refusal(limits) for _ in range(3)] == [None, None, "30"]
    assert refusal(limits, Key("other", "")) is None
    assert [refusal(limits, Key("more", "", requests_per_minute=3)) for _ in range(4)] == [None] * 3 + ["20"]
    clock.time += 30
    assert [refusal(limits) for _ in range(2)] == [None, "30"]
    clock.time += 3600
    assert [refusal(limits) for _ in range(3)] == [None, None, "30"], "a rest saves up one minute's requests"


def test_requests_at_once_are_counted_until_they_end() -> None:
    limits = Limits(None, 2)
    with limits.admit(ANYONE):
        with limits.admit(ANYONE):
            assert refusal(limits) == "1"
            assert refusal(limits, Key("other", "", concurrency=1)) is None
        assert refusal(limits) is None
    with pytest.raises(ZeroDivisionError), limits.admit(ANYONE):
        1 / 0  # noqa: B018
    with limits.admit(ANYONE):
        assert refusal(limits) is None


def test_replicas_share_a_limit() -> None:
    limits = Limits(4, None, share=2, now=Clock())
    assert [refusal(limits) for _ in range(3)] == [None, None, "30"]
