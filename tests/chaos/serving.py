"""The scene of serving: callers ask one query after another of two replicas, which are killed."""

import itertools
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from chaos.disturb import Disturber
from chaos.faults import Fault
from chaos.outcome import Difference
from chaos.scene import LOOK_EVERY_S, RECIPE, ChaosError, Disturbed, Scene, end_of
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.serve.run import free_port

CALLERS = 3
QUERIES = [f"a cat, number {number}" for number in range(12)]
# A replica needs most of this to load its engine, and is then hit at any moment of the rest.
LIFE_S = 60.0
START_S = 300.0
# Behind the last kill, for its replacement to answer.
CALM_S = 20.0
LIMIT_S = 900.0


@dataclass
class Calls:
    """What callers got: for each request its query, the answer or what came instead, and when."""

    url: str
    answers: list[tuple[str, str, float, float]] = field(default_factory=list)

    def ask(self, client: httpx.Client, query: str) -> str:
        message = {"role": "user", "content": query}
        body = {"model": "vpo", "messages": [message], "temperature": 0, "max_tokens": 16}
        began = time.monotonic()
        try:
            reply = client.post(f"{self.url}/v1/chat/completions", json=body)
            told = (
                reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else reply.text
            )
            found = f"{reply.status_code} {told}"
        except (httpx.HTTPError, ValueError) as error:
            found = type(error).__name__
        self.answers.append((query, found, began, time.monotonic()))
        return found

    @contextmanager
    def going_on(self) -> Iterator[None]:
        stop = threading.Event()

        def call(first: int) -> None:
            with httpx.Client(timeout=150) as client:
                for query in itertools.islice(itertools.cycle(QUERIES), first, None):
                    if stop.is_set():
                        return
                    self.ask(client, query)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(160)


class Serving(Scene):
    """Its rows are the requests: each has to get the answer that an undisturbed replica gives."""

    name = "serve"
    nodes = {}  # noqa: RUF012  proxies of several nodes would want the same port of this machine
    head_cpus = 3

    def prepare(self) -> None:
        self.lives = {"Serve replica": LIFE_S, "engine core": LIFE_S}
        self.port = free_port("127.0.0.1")
        self.checkpoint = self.folder / "checkpoint"
        if not self.checkpoint.exists():
            # The tiny policy as training leaves it: with the task prompt in its chat template.
            shutil.copytree(self.models / "policy", self.checkpoint)
            load_tokenizer(str(self.checkpoint), read_prompt("builtin:policy")).save_pretrained(
                self.checkpoint
            )

    def disturb(self, faults: Sequence[Fault], name: str) -> Disturbed:
        log, disturber = self.folder / f"{name}.log", Disturber(faults, self.lives, self.cluster)
        calls = Calls(f"http://127.0.0.1:{self.port}")
        sets = {"serve.port": self.port, "serve.pool": "{size: 2, num_cpus: 0.3}"}
        server = self.start(self.vpo("serve", sets, str(self.checkpoint), "--recipe", str(RECIPE)), log)
        began, broken = time.monotonic(), []
        expected: dict[str, str] = {}
        try:
            expected = self._expected(calls, log)
            began = time.monotonic()
            with calls.going_on():
                while disturber.waiting or time.monotonic() < disturber.hits[-1].at + CALM_S:
                    disturber.look(server.pid)
                    if server.poll() is not None or time.monotonic() > began + LIMIT_S:
                        raise ChaosError(f"the endpoint has ended, or took too long: {log}\n{end_of(log)}")
                    time.sleep(LOOK_EVERY_S)
        except ChaosError as error:
            broken = [str(error)]
        finally:
            wall_s = time.monotonic() - began
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=60)
            finally:
                server.kill()
        for hit in disturber.hits:
            # What the slowest caller waited for whom it struck.
            struck = [
                ended - asked for _, _, asked, ended in calls.answers if asked <= hit.at + 1 <= ended + 1
            ]
            hit.lost_s = max(struck, default=0.0)
        left_behind = disturber.finish()
        lost = [f"{query}: {found}" for query, found, *_ in calls.answers if found != expected.get(query)]
        differs = Difference(tuple(lost), ())
        return Disturbed(disturber.hits, disturber.waiting, differs, 0, left_behind, broken, wall_s)

    def _expected(self, calls: Calls, log: Path) -> dict[str, str]:
        """The answers before anything is killed; waits for the endpoint to be up."""
        deadline = time.monotonic() + START_S
        with httpx.Client(timeout=150) as client:
            while not calls.ask(client, QUERIES[0]).startswith("200"):
                if time.monotonic() > deadline:
                    raise ChaosError(f"the endpoint was not up within {START_S:g} s: {log}\n{end_of(log)}")
                time.sleep(1)
            calls.answers.clear()
            return {query: calls.ask(client, query) for query in QUERIES}
