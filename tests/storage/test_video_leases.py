"""A lease on a video: one renderer has it, on a disk or an object store, and a dead one leaves it."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vpo_ray.files.folder import Folder
from vpo_ray.storage import claims, video_leases
from vpo_ray.storage.video_leases import VideoLeases

KEY, OTHER = "ab" + "0" * 30, "cd" + "0" * 30


@pytest.fixture(params=["disk", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return Folder(tmp_path)
    options = request.getfixturevalue("s3_options")
    return Folder(f"s3://videos/leases-{abs(hash(request.node.name))}?{options}")


def test_one_renderer_has_the_lease_of_a_video(store: Folder) -> None:
    one, other = VideoLeases(store), VideoLeases(store)
    assert one.take(KEY)
    assert not other.take(KEY)
    assert (other.taken(KEY), other.taken(OTHER)) == (True, False)
    assert other.take(OTHER), "another video is free"
    other.give_back(KEY)
    assert other.taken(KEY), "only who has it gives it back"
    one.give_back(KEY)
    assert other.take(KEY)
    for key in (KEY, OTHER):
        other.give_back(key)
    assert store.files() == []


def test_many_that_ask_at_once_get_it_one_after_the_other(store: Folder) -> None:
    have, most, done = 0, 0, 0
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal have, most, done
        leases = VideoLeases(store)
        end = time.monotonic() + 60
        while not leases.take(KEY):
            assert time.monotonic() < end
            time.sleep(0.01 * (number + 1))
        with lock:
            have += 1
            most = max(most, have)
        time.sleep(0.02)
        with lock:
            have, done = have - 1, done + 1
        leases.give_back(KEY)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 4)


def test_a_lease_that_is_renewed_is_not_taken_over(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_leases, "BEAT_S", 0.1)
    monkeypatch.setattr(video_leases, "STALE_S", 1.0)
    one, other = VideoLeases(store), VideoLeases(store)
    assert one.take(KEY)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert not other.take(KEY)
        time.sleep(0.1)
    one.give_back(KEY)


def test_a_renderer_that_was_killed_leaves_its_lease_at_once(tmp_path: Path) -> None:
    code = f"""
import os
from vpo_ray.files.folder import Folder
from vpo_ray.storage.video_leases import VideoLeases
assert VideoLeases(Folder({str(tmp_path)!r})).take({KEY!r})
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert Folder(tmp_path).files()
    assert VideoLeases(Folder(tmp_path)).take(KEY)


def test_a_lease_without_a_heartbeat_ends(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_leases, "STALE_S", 0.3)
    for number, damage in enumerate((b"", b"{", b'{"host": "faraway"}')):
        store.write(f"leases/{KEY}-{number:032x}.json", damage)
    leases = VideoLeases(store)
    assert not leases.take(KEY)
    time.sleep(0.4)
    assert leases.take(KEY)
    leases.give_back(KEY)
    assert store.files() == []


def test_a_store_that_fails_to_read_a_claim_for_a_moment_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RETRY_S", 0.01)
    one, other = VideoLeases(Folder(tmp_path)), VideoLeases(Folder(tmp_path))
    assert one.take(KEY)
    read, failures = Folder.read, iter([OSError("flush"), OSError("flush")])

    def fails_first(folder: Folder, name: str) -> bytes:
        for error in failures:
            raise error
        return read(folder, name)

    monkeypatch.setattr(Folder, "read", fails_first)
    assert not other.take(KEY)
    one.give_back(KEY)
    assert other.take(KEY)
