"""`vpo push`: what a run made, as repositories of a Hugging Face hub.

A policy goes with its card and the run's newest evaluation; SFT data and pairs go as a data set, with a card
that says how many rows of each there are, where their queries came from, and whether the rewards agree. Both
name the run's fingerprint and hold the recipe that the run directory has. Cards name a model by its hub id,
or by the last part of its path.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath

import yaml

from vpo_ray.files.folder import Folder
from vpo_ray.loop.export import PREFERENCE_FILE, SFT_FILE, export
from vpo_ray.recipe import Recipe, locate
from vpo_ray.storage.hub import push_folder
from vpo_ray.storage.model_cache import fetch
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train.save_pretrained import model_card

_EVALUATION = ("results.json", "report.html", "examples.png")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class PushError(ValueError):
    """A run that has nothing to push."""


def push_policy(recipe: Recipe, run: RunDir, repo: str, private: bool = True) -> str:
    """Push the policy that the run, or its last round, trained last, with its newest evaluation.

    Args:
        repo: `owner/name`; made if it is not there.

    Returns:
        The repository's address.

    Raises:
        PushError: there is no trained policy.
        StorageError: it cannot be read, or the hub does not take it.
    """
    checkpoint = run.last_policy(recipe.learns or "sft")
    if not Folder(checkpoint).exists("vpo.json"):
        raise PushError(f"{checkpoint} is not a trained policy: run `vpo run` or `vpo train` first")
    with tempfile.TemporaryDirectory(prefix="vpo-push-") as made:
        folder = Path(made)
        for file in Path(fetch(checkpoint)).iterdir():
            if file.is_file() and file.name not in ("README.md", "vpo.json"):
                (folder / file.name).symlink_to(file.resolve())
        facts = json.loads(Folder(checkpoint).read("vpo.json"))
        facts["base_model"] = _public_name(recipe.policy.model)
        (folder / "vpo.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
        card = model_card(facts)
        newest = run.newest_evaluation()
        if newest is not None:
            evaluation = Folder(run.at(f"evaluation/{newest['id']}"))
            for name in _EVALUATION:
                if evaluation.exists(name):
                    (folder / "evaluation").mkdir(exist_ok=True)
                    (folder / "evaluation" / name).write_bytes(evaluation.read(name))
            card += "\n[evaluation/report.html](evaluation/report.html) compares it with others.\n"
        (folder / "README.md").write_text(card, "utf-8")
        (folder / "recipe.yaml").write_bytes(Folder(run.uri).read("recipe.yaml"))
        return push_folder(folder, repo, "model", private, f"Policy of run {recipe.name}")


def push_data(recipe: Recipe, run: RunDir, repo: str, private: bool = True, license: str = "other") -> str:
    """Push SFT data and pairs as a data set. See `push_policy`, and `loop.export` for what it raises.

    Args:
        license: of the data, as the hub names licences.
    """
    with tempfile.TemporaryDirectory(prefix="vpo-push-") as made:
        folder = Path(made)
        rows = export(recipe, run, "trl", str(folder))
        (folder / "README.md").write_text(data_card(recipe, run, rows, license), "utf-8")
        (folder / "recipe.yaml").write_bytes(Folder(run.uri).read("recipe.yaml"))
        return push_folder(folder, repo, "dataset", private, f"Data of run {recipe.name}")


def data_card(recipe: Recipe, run: RunDir, rows: Mapping[str, int], license: str) -> str:
    """The README of a data set of `rows` by file."""
    names = {SFT_FILE: "sft", PREFERENCE_FILE: "preference"}
    header = {
        "license": license,
        "task_categories": ["text-generation"],
        "tags": ["text-to-video", "prompt-optimization", "preference"],
        "configs": [{"config_name": names[file], "data_files": file} for file in rows],
    }
    queries = list(run.table("queries").rows(["source", "unsafe"]))
    sources = Counter(str(_public_name(row["source"] or "not told")) for row in queries)
    kinds = Counter(row["kind"] for row in run.table("pairs").rows(["kind"]))
    unsafe = sum(bool(row["unsafe"]) for row in queries)
    counts = [
        ("recipe fingerprint", f"`{recipe.fingerprint()}`"),
        *((f"rows of `{file}`", count) for file, count in rows.items()),
        *((f"pairs by {kind}", count) for kind, count in sorted(kinds.items())),
        ("queries", len(queries)),
        ("labelled as unsafe", unsafe),
        *((f"queries from {_plain(source)}", count) for source, count in sources.most_common()),
        ("policy", _plain(_public_name(recipe.policy.model))),
        ("judge", _plain(_public_name(recipe.judge.model))),
        ("video model", _plain(_public_name(recipe.render.model or recipe.render.preset or "not told"))),
        *(("reward", _plain(_public_name(found))) for found in [recipe.reward.model] if found),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in counts)
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n"
        "# Prompts and preferences for a text-to-video model\n\n"
        "SFT rows are a user's query with a prompt to learn; preference rows a query with a chosen and a "
        "rejected prompt: by text, where a judge refined the rejected one, or by video, where the chosen "
        "one's video scored higher ([VPO](https://arxiv.org/abs/2503.20491)). Queries are what users typed, "
        "unsafe ones included. "
        f"Licence: `{license}`; those of the queries, the models and the reward apply too.\n\n"
        f"| | |\n|---|---|\n{table}{_agreement(run)}\n"
        "`recipe.yaml` makes them anew.\n"
    )


def _agreement(run: RunDir) -> str:
    """How far the rewards agree, where there are several."""
    ledger = run.read_json("ledger.json") if run.exists("ledger.json") else {}
    lines = [
        f"| rank correlation of {_plain(one['a'])} and {_plain(one['b'])} | {one['mean']:.2f} |\n"
        for one in ledger.get("stages", {}).get("score", {}).get("agreement", [])
        if one["mean"] is not None
    ]
    return "".join(lines)


def _public_name(model: str) -> str:
    """A hub id as it is; of a path or URI the last part."""
    return model if _HUB_ID.fullmatch(model) and not Path(locate(model)).exists() else PurePath(model).name


def _plain(text: str) -> str:
    return "`" + "".join(c if c.isprintable() and c not in "`|<>" else "?" for c in text) + "`"
