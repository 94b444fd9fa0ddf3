"""What `vpo run` leaves on the screen: the funnel, one example, and where to look."""

from __future__ import annotations

import shlex
import textwrap

from vpo_ray.loop.ledger import alarms, funnel
from vpo_ray.stages.preview import told
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.status_text import duration

WIDTH = 96


def run_summary(run: RunDir, most: int | None = None) -> str:
    """The end of a run as text. Text of users and models is shown without control characters, each in at most
    `most` lines."""
    ledger = run.read_json("ledger.json")
    lines = ["", " → ".join(f"{count} {name}" for name, count in funnel(ledger).items())]
    lines += [f"warning: {alarm}" for alarm in alarms(ledger)]
    if probe := ledger["stages"].get("preview", {}).get("probe"):
        lines.append(f"the probe of render.preview: {told(probe)}")
    pair = ledger["stages"].get("pair", {})
    if "videos" in pair and pair["kinds"].get("video"):
        rates = ", ".join(f"{found['per_video_pair']} ({name})" for name, found in pair["videos"].items())
        lines.append(f"videos for a video pair, by render.strategy: {rates}")
    if spilled := ledger.get("last_run", {}).get("spilled_bytes"):
        lines.append(f"the object store spilled {spilled / 1e9:.2f} GB to disk: see docs/operations.md")
    took = ledger.get("last_run", {}).get("phases", {})
    longest = sorted(took, key=lambda name: (-took[name], name))
    if shown := [f"{name} {duration(took[name])}" for name in longest if took[name] >= 1]:
        lines.append(f"took {duration(sum(took.values()))}: {', '.join(shown)}")
    if run.exists("example.json"):
        example = run.read_json("example.json")
        order = [name for name in ("query", "sft", "dpo", "rl") if name in example]
        lines += ["", *(line for name in order for line in _shown(name, example[name], most))]
    lines += ["", f"report   {run.at('report/index.html')}", f"ledger   {run.at('ledger.json')}"]
    for phase in ("rl", "dpo", "sft"):
        if run.exists(f"checkpoints/{phase}/vpo.json"):
            policy = run.at(f"checkpoints/{phase}")
            # The run's own recipe has the engine's settings; a recipe at a URI is not read from there.
            more = f" --recipe {shlex.quote(run.at('recipe.yaml'))}" if run.is_local else ""
            lines += [f"policy   {policy}", f"serve    vpo serve {shlex.quote(policy)}{more}"]
            break
    return "\n".join(lines) + "\n"


def _shown(name: str, text: str, most: int | None) -> list[str]:
    printable = "".join(c if c.isprintable() else " " for c in text)
    wrapped = textwrap.wrap(printable, WIDTH - 9, max_lines=most, placeholder=" …") or [""]
    return [f"{name if i == 0 else '':<8} {line}" for i, line in enumerate(wrapped)]
