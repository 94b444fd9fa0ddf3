"""Everything that the small world's recipes name: `vpo world FOLDER`."""

from __future__ import annotations

from pathlib import Path

from vpo_ray.world.policy import make_smollm2


def make_world(folder: str | Path) -> None:
    """Make `policy` in a folder; what is complete is kept.

    Raises:
        WorldError: see `make_smollm2`.
    """
    folder = Path(folder).expanduser()
    make_smollm2(folder / "policy")
