"""Settings of the environment with which no Ray cluster can be joined or started say what to do."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpo_ray import cli
from vpo_ray.stream import connection

RECIPE = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that is in no cluster: the tests' own may be there."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # `connect` leaves its own settings in the environment.
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example/dashboard"])
def test_a_dashboards_address_is_refused_with_what_to_do(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cli.main(["doctor", str(RECIPE)]) == 2
    told = capsys.readouterr().err
    assert address in told
    assert "vpo submit" in told
    assert "unset RAY_ADDRESS" in told


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_whose_path_is_too_long_is_named(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("é" * 45)
    folder.mkdir()
    monkeypatch.setenv(variable, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # Python looks at TMPDIR once
    with pytest.raises(connection.ClusterSettingError, match=rf"^{variable}=.* Set {variable} to"):
        connection.connect()


def test_the_longest_folder_that_is_let_through_has_room_for_rays_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = connection._SOCKET_LIMIT - len(connection._SOCKET)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (longest - 1))
    connection._check_socket_paths()
    from ray._private.utils import validate_socket_filepath

    validate_socket_filepath(os.environ["RAY_TMPDIR"] + connection._SOCKET)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * longest)
    with pytest.raises(connection.ClusterSettingError):
        connection._check_socket_paths()


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(connection.ClusterError, match=r"RAY_ADDRESS=nonsense: Invalid address format"):
        connection.connect()


@pytest.mark.parametrize("home", ["/proc/nobody", None])
def test_a_home_directory_that_ray_cannot_write_is_told(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no home: HOME is / or not set."""
    import ray

    def init(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "/.ray")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    with pytest.raises(connection.ClusterError, match=r"'/\.ray'\. Ray keeps .* set HOME to a folder"):
        connection.connect()
