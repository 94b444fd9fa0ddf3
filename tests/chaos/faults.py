"""Which processes are killed, how often and when: all drawn from one seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    process: what is killed, a key of processes.TITLES, or `driver`; in the scene `alone` also `group`
    (SIGTERM to the driver and all that shares its process group) and `raylet`; in `two-drivers` what is
    done instead (`second driver`, `frozen driver`). node: not that process itself but the raylet of the
    node that it runs on. scene: the run that it is done to. share: how many of 64 faults are of this
    kind. progress: files of the run directory, any newer one of which tells that the work which stood
    still goes on.
    """

    name: str
    process: str
    scene: str
    share: int
    progress: tuple[str, ...] = ()
    node: bool = False


_FROM_SAMPLE = ("candidates/*.parquet", "verdicts/*.parquet", "renders/*.parquet", "feedback/*.parquet")
_CHECKPOINTS = ("checkpoints/dpo-*/step-*", "checkpoints/dpo/*")

KINDS = (
    Kind("sampler", "sampler", "generate", 6, _FROM_SAMPLE),
    Kind("judge", "judge", "generate", 6, _FROM_SAMPLE[1:]),
    Kind("engine core", "engine core", "generate", 6, _FROM_SAMPLE),
    Kind("renderer", "renderer", "render", 7, _FROM_SAMPLE[2:]),
    Kind("scorer", "scorer", "render", 7, _FROM_SAMPLE[3:]),
    Kind("raylet, sampling", "sampler", "generate", 3, _FROM_SAMPLE, node=True),
    Kind("raylet, rendering", "renderer", "render", 4, _FROM_SAMPLE[2:], node=True),
    Kind("driver, generating", "driver", "generate", 5, _FROM_SAMPLE),
    Kind("training rank", "training rank", "train", 7, _CHECKPOINTS),
    Kind("raylet, training", "training rank", "train", 3, _CHECKPOINTS, node=True),
    Kind("driver, training", "driver", "train", 3, _CHECKPOINTS),
    Kind("Serve replica", "Serve replica", "serve", 4),
    Kind("Serve engine core", "engine core", "serve", 3),
    Kind("process group, alone", "group", "alone", 2),
    Kind("driver, alone", "driver", "alone", 2),
    Kind("raylet, alone", "raylet", "alone", 2),
    Kind("second driver", "second driver", "two-drivers", 1),
    Kind("driver, frozen", "frozen driver", "two-drivers", 2),
)
NAMES = tuple(kind.name for kind in KINDS)


@dataclass(frozen=True)
class Fault:
    """One kill.

    after: when, as a share of the time for which such a process lives in an undisturbed run. pick:
    which one, where there are several. number: its place among those that were drawn.
    """

    kind: Kind
    after: float
    pick: int
    number: int = 0


def draw(seed: int, count: int, names: Sequence[str] = NAMES) -> list[Fault]:
    """`count` faults of the named kinds in random order, each kind by its share and at least once.

    The same arguments give the same faults.
    """
    chance = random.Random(seed)
    kinds = [kind for kind in KINDS if kind.name in names]
    whole = sum(kind.share for kind in kinds)
    # The first `count` of a sequence in which every stretch has all kinds by their shares.
    places = sorted(
        ((n + chance.random()) / kind.share, kind.name, kind)
        for kind in kinds
        for n in range(-(-kind.share * count // whole) + 1)
    )
    chosen = [kind for _, _, kind in places[:count]]
    for kind in kinds:
        if kind not in chosen and len(chosen) >= len(kinds):
            common = max(chosen, key=chosen.count)
            chosen[len(chosen) - 1 - chosen[::-1].index(common)] = kind
    chance.shuffle(chosen)
    return [Fault(kind, chance.random(), chance.randrange(2**16), n) for n, kind in enumerate(chosen)]


def share_out(faults: Sequence[Fault], per_run: int) -> list[tuple[str, list[Fault]]]:
    """The faults of each run, at most so many, with the scene that the run is of."""
    runs = []
    for scene in dict.fromkeys(kind.scene for kind in KINDS):
        mine = [fault for fault in faults if fault.kind.scene == scene]
        runs += [(scene, mine[at : at + per_run]) for at in range(0, len(mine), per_run)]
    return runs
