"""Who may call: keys are made, found, limited and revoked without a restart."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.cli import main
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.keys import ANYONE, Key, KeyFileError, KeyRing, make_key, parse_line
from vpo_ray.serve.limits import CallerLimits


@contextmanager
def admitted(limits: CallerLimits, key: Key, work: int = 1) -> Iterator[None]:
    with limits.admit(key) as admission:
        admission.take(work)
        yield


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def status(ring: KeyRing, header: str | None) -> int:
    try:
        ring.find(header)
    except ApiError as error:
        return error.status if error.headers == {"WWW-Authenticate": "Bearer"} else 0
    return 200


def test_a_made_key_is_known_by_its_line_alone(tmp_path: Path) -> None:
    key, line = make_key("web")
    assert key not in line
    assert len(key) > 40
    (tmp_path / "keys").write_text(f"# callers\n\n{line} requests_per_minute=5 scopes=optimize\n", "utf-8")
    found = KeyRing(tmp_path / "keys").find(f"Bearer {key}")
    assert (found.name, found.requests_per_minute, found.concurrency) == ("web", 5, None)
    assert found.scopes == ("optimize",)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer vpo-wrong", "Basic {key}", "{key}", "Bearer \udcff"]
)
def test_who_has_no_key_is_refused(tmp_path: Path, header: str | None) -> None:
    key, line = make_key("web")
    (tmp_path / "keys").write_text(line, "utf-8")
    assert status(KeyRing(tmp_path / "keys"), header and header.format(key=key)) == 401


def test_the_command_prints_a_key_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "mobile.app"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    (tmp_path / "keys").write_text(second.partition(":")[2], "utf-8")
    assert KeyRing(tmp_path / "keys").find(f"bearer {first.split()[-1]}").name == "mobile.app"
    assert main(["key", "two words"]) == 2
    assert "cannot name a key" in capsys.readouterr().err


def test_keys_come_and_go_without_a_restart(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "keys"
    (old, old_line), (new, new_line) = make_key("old"), make_key("new")
    path.write_text(old_line, "utf-8")
    ring = KeyRing(path, clock)
    path.write_text(f"{new_line}\nbroken line\n", "utf-8")
    assert status(ring, f"Bearer {old}") == 200, "not looked at again yet"
    clock.time += 2
    assert (status(ring, f"Bearer {old}"), status(ring, f"Bearer {new}")) == (401, 200)
    path.unlink()
    clock.time += 2
    assert status(ring, f"Bearer {new}") == 401
    path.write_text(old_line, "utf-8")
    clock.time += 2
    assert status(ring, f"Bearer {old}") == 200


def test_a_mounted_secret_is_a_folder_of_keys(tmp_path: Path) -> None:
    """Kubernetes mounts a Secret as links into a hidden folder, which it swaps when the Secret changes."""
    clock = Clock()
    (one, one_line), (two, two_line) = make_key("one"), make_key("two")
    for version, lines in (("..v1", [one_line, two_line]), ("..v2", [two_line])):
        (tmp_path / version).mkdir()
        for number, line in enumerate(lines):
            (tmp_path / version / f"key{number}").write_text(line, "utf-8")
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


def test_a_file_of_a_folder_that_cannot_be_read_shuts_nobody_else_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, (one, one_line), (two, two_line) = Clock(), make_key("one"), make_key("two")
    (tmp_path / "a").write_text(one_line, "utf-8")
    ring = KeyRing(tmp_path, clock)
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00 no text")
    for _ in range(3):
        clock.time += 2
        assert (status(ring, f"Bearer {one}"), status(ring, f"Bearer {two}")) == (200, 401)
    assert caplog.text.count("its keys are not admitted") == 1
    (tmp_path / "b").write_text(two_line, "utf-8")
    clock.time += 2
    assert (status(ring, f"Bearer {one}"), status(ring, f"Bearer {two}")) == (200, 200)
    (tmp_path / "a").unlink()
    clock.time += 2
    assert (status(ring, f"Bearer {one}"), status(ring, f"Bearer {two}")) == (401, 200)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("web", "64 hex digits"),
        ("web vpo-in-the-clear", "64 hex digits"),
        ("!web " + "0" * 64, "not a name"),
        ("web " + "0" * 64 + " speed=3", "no option"),
        ("web " + "0" * 64 + " concurrency=0", "no option"),
        ("web " + "0" * 64 + " scopes=admin", "no option"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_no_secret(line: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=told) as error:
        parse_line(line)
    assert "in-the-clear" not in str(error.value)
    (tmp_path / "keys").write_text(line, "utf-8")
    with pytest.raises(KeyFileError, match="line 1"):
        KeyRing(tmp_path / "keys")


def test_no_keys_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="does not exist"):
        KeyRing(tmp_path / "keys")
    (tmp_path / "keys").write_text("# nobody\n", "utf-8")
    with pytest.raises(KeyFileError, match="holds no key"):
        KeyRing(tmp_path / "keys")


def refusal(limits: CallerLimits, key: Key = ANYONE, work: int = 1) -> str | None:
    try:
        with admitted(limits, key, work):
            return None
    except ApiError as error:
        return error.headers["Retry-After"] if error.status == 429 else {413: "never"}[error.status]


def test_requests_a_minute_are_counted_by_key() -> None:
    clock = Clock()
    limits = CallerLimits(2, None, now=clock)
    assert [refusal(limits) for _ in range(3)] == [None, None, "30"]
    assert refusal(limits, Key("other", "")) is None
    assert [refusal(limits, Key("more", "", requests_per_minute=3)) for _ in range(4)] == [None] * 3 + ["20"]
    clock.time += 30
    assert [refusal(limits) for _ in range(2)] == [None, "30"]
    clock.time += 3600
    assert [refusal(limits) for _ in range(3)] == [None, None, "30"], "a rest saves up one minute's requests"


def test_requests_at_once_are_counted_until_they_end() -> None:
    limits = CallerLimits(None, 2)
    with admitted(limits, ANYONE):
        with admitted(limits, ANYONE):
            assert refusal(limits) == "1"
            assert refusal(limits, Key("other", "", concurrency=1)) is None
        assert refusal(limits) is None
    with pytest.raises(ZeroDivisionError), admitted(limits, ANYONE):
        1 / 0  # noqa: B018
    with admitted(limits, ANYONE):
        assert refusal(limits) is None


def test_replicas_share_a_limit() -> None:
    limits = CallerLimits(4, None, share=2, now=Clock())
    assert [refusal(limits) for _ in range(3)] == [None, None, "30"]


def test_a_request_costs_the_prompts_that_it_asks_for() -> None:
    clock = Clock()
    limits = CallerLimits(60, None, now=clock)
    assert refusal(limits, work=48) is None
    assert refusal(limits, work=48) == "36", "12 are left, one comes back a second"
    assert refusal(limits, work=12) is None
    assert refusal(limits, work=1) == "1"
    clock.time += 36
    assert refusal(limits, work=37) == "1"
    assert refusal(limits, work=36) is None


@given(st.integers(1, 50), st.integers(1, 4), st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_who_comes_back_when_told_is_admitted(rate: int, share: int, works: list[int]) -> None:
    clock = Clock()
    limits = CallerLimits(rate, rate, share=share, now=clock)
    for work in works:
        told = refusal(limits, work=work)
        assert (told == "never") == (work > rate)
        if told not in (None, "never"):
            clock.time += int(told)
            assert refusal(limits, work=work) is None


def test_in_the_long_run_no_more_is_done_than_the_rate() -> None:
    clock, done = Clock(), 0
    limits = CallerLimits(30, None, share=2, now=clock)
    for _ in range(6000):
        done += 25 if refusal(limits, work=25) is None else 0
        clock.time += 0.1
    assert 10 * 15 - 25 <= done <= 10 * 15 + 30, "its half of ten minutes' prompts, and the first burst"


def test_more_than_the_whole_limit_is_refused_for_good_with_what_to_do() -> None:
    for limits in (CallerLimits(8, None), CallerLimits(None, 8), CallerLimits(1000, 8)):
        with (
            pytest.raises(ApiError, match=r"asks for 9 prompts.*8 .*smaller n") as told,
            admitted(limits, ANYONE, 9),
        ):
            pass
        assert (told.value.status, told.value.code) == (413, "request_too_large")
        assert "Retry-After" not in told.value.headers
        assert refusal(limits, work=8) is None


def test_prompts_at_once_are_counted_until_they_end() -> None:
    limits = CallerLimits(None, 8)
    with admitted(limits, ANYONE, 6):
        assert refusal(limits, work=3) == "1"
        with admitted(limits, ANYONE, 2):
            assert refusal(limits) == "1"
    assert refusal(limits, work=8) is None


def test_the_smallest_request_fits_limits_that_are_smaller() -> None:
    """Best of 4 with a key for one request at a time: the recipe asked for the four."""
    clock = Clock()
    limits = CallerLimits(2, 1, now=clock, least=4)
    with admitted(limits, ANYONE, 4):
        assert refusal(limits, work=4) is not None
    assert refusal(limits, work=5) == "never"
    assert refusal(limits, work=4) == "120", "2 of 4 were lent, and it is full at 2"
    clock.time += 120
    assert refusal(limits, work=4) is None


def test_what_is_refused_for_its_body_costs_one() -> None:
    limits = CallerLimits(3, None, now=Clock())
    for _ in range(5):
        with limits.admit(ANYONE) as admission:
            admission.charge_invalid()
    assert refusal(limits) == "20"
