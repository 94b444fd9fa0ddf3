"""The commands that take a run one step further: the stages of `stages.spec`, and the phases between them."""

from __future__ import annotations

from vpo_ray.stages import spec

STEPS = {
    "curate": "read raw queries into queries/",
    "evolve": "prompts of the sft split's queries, evolved against the rewards, into evolutions/",
    "sft": "train the policy on sft.data, the drafts or the evolved prompts, into checkpoints/sft",
    "generate": "curate what is not yet, then {stages} as one stream: to feedback/",
    "pair": "feedback/ to pairs/",
    "group": "make groups/ of every query's candidates, for rl",
    "rl": "train the policy on groups/ into checkpoints/rl",
    "dpo": "train the policy on pairs/ into checkpoints/dpo",
    "train": "SFT, and once generation is done pairs and DPO",
    "evaluate": "policies side by side on held-out queries, with intervals and tests, into evaluation/",
    "report": "write ledger.json and report/index.html",
}
# The chain whose stages come behind a step.
_BEHIND: dict[str, spec.ChainName] = {"curate": "drafting", "generate": "generation"}


def step_commands() -> dict[str, str]:
    """The help of every such command, in the order of the loop."""
    if clash := next((stage.name for stage in spec.stages() if stage.help and stage.name in STEPS), None):
        raise command_taken(clash)
    *most, last = spec.names("generation")
    found: dict[str, str] = {}
    for name, text in STEPS.items():
        found[name] = text.format(stages=f"{', '.join(most)} and {last}")
        if name in _BEHIND:
            found |= {stage.name: stage.help for stage in spec.stages(_BEHIND[name]) if stage.help}
    return found


def command_taken(name: str) -> spec.StageError:
    """What is wrong with a stage of one's own that is called like another command."""
    return spec.StageError(f"a stage that was registered is called {name}, as a command of vpo is: rename it")


def retrying_commands() -> set[str]:
    """Those whose rows can fail, and be taken again."""
    return {"evolve", "generate", "evaluate", *(stage.name for stage in spec.stages() if stage.help)}


def sharded_commands() -> set[str]:
    """Those that can take a shard of the queries, as `vpo_ray.loop.shards` does."""
    return {"generate", *spec.names("generation")}
