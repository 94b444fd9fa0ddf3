"""`vpo`: one command for the whole loop and one for each of its stages.

vpo init                            ask what is wanted, and write a recipe
vpo fetch recipe.yaml               download the models and files that it names
vpo run recipe.yaml                 everything, or what is left of it
vpo plan recipe.yaml                check the recipe and say what it will take
vpo evaluate recipe.yaml            does it help, by how much, and how sure is that
vpo submit recipe.yaml              the same as a job of a Ray cluster
vpo status|runs|logs                how far runs are, which there are, why rows failed
vpo doctor recipe.yaml              check every node of the cluster
vpo sample|judge|render|score ...   one stage, from its table to the next
vpo videos ls|verify|prune STORE    the store of rendered videos
vpo compare page|votes              what people prefer, on a page of blind pairs
vpo plugins                         models of others that a recipe can name here
vpo schema                          every key of a recipe, for editors or people
vpo convert-reward KIND ...         published weights of a reward, as safetensors with a card
vpo serve CHECKPOINT                the trained policy behind an OpenAI-compatible endpoint
vpo deploy recipe.yaml              the same on a cluster, where it stays
vpo key NAME                        a key for a caller of that endpoint
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vpo_ray import terminal
from vpo_ray.cli import compare as compare_command
from vpo_ray.cli import console, look
from vpo_ray.cli import convert_reward as convert_command
from vpo_ray.cli import evaluate as evaluate_command
from vpo_ray.cli import feedback as feedback_command
from vpo_ray.cli import fetch as fetch_command
from vpo_ray.cli import init as init_command
from vpo_ray.cli import plan as plan_command
from vpo_ray.cli import plugins as plugins_command
from vpo_ray.cli import push as push_command
from vpo_ray.cli import reference as reference_command
from vpo_ray.cli import refine as refine_command
from vpo_ray.cli import submit as submit_command
from vpo_ray.cli import videos as videos_command
from vpo_ray.cli.extras import install_advice
from vpo_ray.cli.steps import command_taken, retrying_commands, sharded_commands, step_commands
from vpo_ray.stages.spec import StageError

if TYPE_CHECKING:
    from vpo_ray.recipe import Recipe
    from vpo_ray.records import Shard

# What a machine refuses for reasons of its own or its user's: the path and the reason say all.
_OF_THE_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: see `reference.EXIT_STATUS`."""
    console.forgive()
    try:
        parser = _parser()
    except StageError as error:  # a stage of the user's own
        return _fail(str(error), 2)
    arguments = parser.parse_args(argv)
    console.log_to_stderr(arguments.verbose, getattr(arguments, "shard", None))
    try:
        status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        # connection.Terminated, which is not imported for the commands that need no Ray.
        terminated = type(stop) is not KeyboardInterrupt
        what = "terminated" if terminated else "interrupted"
        return _fail(f"{what}; the same command goes on where this stopped", 143 if terminated else 130)
    except Exception as error:
        # Our own errors explain themselves; for any other the trace is what a bug report needs.
        if isinstance(error, ModuleNotFoundError) and (advice := install_advice(error)):
            return _fail(advice, 1)
        ours = type(error).__module__.startswith("vpo_ray")
        if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_MACHINE:
            logging.getLogger("vpo_ray").debug("the trace of it", exc_info=True)
            return _fail(f"{error.filename}: {error.strerror}", 1)
        if not ours:
            logging.getLogger(__name__).exception("unexpected failure")
        message = str(error) or type(error).__name__
        if not ours:
            from vpo_ray.stream.last_words import with_causes

            message = with_causes(message)
        status = getattr(error, "exit_status", 2 if ours and isinstance(error, ValueError) else 1)
        return _fail(message, status)


def job(command: str) -> int:
    """`main` for the entry points in jobs/: there the recipe is given as `--recipe`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    given, rest = parser.parse_known_args()
    return main([command, *filter(None, [given.recipe]), *rest])


def _fail(message: str, status: int) -> int:
    terminal.ours().write(f"vpo: error: {message}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vpo",
        description="Make a prompt optimiser for your own text-to-video model, on Ray.",
        epilog="Start with: vpo world runs/world && vpo run laptop, or vpo init",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show debug logs, all that libraries say, and the workers' output",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, help: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        if name in commands.choices:
            raise command_taken(name)
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(command=run, name=name)
        return sub

    def with_recipe(
        name: str, help: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        sub = command(name, help, run)
        sub.add_argument("recipe", help="recipe file (YAML), or the name of a shipped one, e.g. laptop")
        sub.add_argument("--out", metavar="DIR", help="run directory or URI, instead of the recipe's `out`")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a key, e.g. render.steps=30",
        )
        return sub

    init_command.add(command("init", init_command.HELP, init_command.run))
    whole = with_recipe("run", "run the whole loop; again to go on where it stopped", _run)
    whole.add_argument("--retry-errors", action="store_true", help="take rows that failed once more")
    whole.add_argument(
        "--rounds",
        type=_count,
        default=1,
        metavar="N",
        help="repeat from sampling on with the policy that DPO left, in rounds/2 to rounds/N",
    )
    planned = with_recipe("plan", "check a recipe and say what it will take, without touching a GPU", _plan)
    plan_command.add(planned)
    fetch_command.add(with_recipe("fetch", fetch_command.HELP, _fetch))
    submit_command.add(
        with_recipe("submit", "hand `run` or another command to a Ray cluster as a job", _submit)
    )
    look.add_status(command("status", look.STATUS_HELP, _plan))
    look.add_runs(command("runs", look.RUNS_HELP, _plan))
    look.add_logs(command("logs", look.LOGS_HELP, _plan))
    doctor = command("doctor", "check every node of a cluster, and what a recipe needs of it", _doctor)
    doctor.add_argument("recipe", nargs="?", help="recipe file, whose models, storage and secrets to check")
    doctor.add_argument("--out", metavar="DIR", help="run directory or URI, instead of the recipe's `out`")
    doctor.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    doctor.add_argument("--json", action="store_true", help="a JSON list of findings instead of a table")
    tiny = command(
        "tiny", "make tiny checkpoints of the real architectures, to try everything on a CPU", _tiny
    )
    tiny.add_argument("folder", metavar="DIR")
    world = command(
        "world", "make a small world to learn in on a CPU: a published LLM, queries, SFT data", _world
    )
    world.add_argument("folder", metavar="DIR")
    run_of = {
        "train": _train,
        "sft": _train,
        "dpo": _train,
        "rl": _train,
        "evaluate": _evaluate,
        "report": _report,
    }
    run_of |= dict.fromkeys(sharded_commands(), _generate)
    for name, text in step_commands().items():
        sub = with_recipe(name, text, run_of.get(name, _phase))
        if name == "evaluate":
            evaluate_command.add(sub)
        if name in retrying_commands():
            sub.add_argument("--retry-errors", action="store_true", help="take rows that failed once more")
        if name in sharded_commands():
            sub.add_argument(
                "--shard",
                type=_shard,
                metavar="I/N",
                help="the I-th of N parts of the queries, beside others",
            )
    refine_command.add(command("refine", refine_command.HELP, _refine))
    compare_command.add(command("compare", compare_command.HELP, _plan))
    videos_command.add(command("videos", videos_command.HELP, _plan))
    feedback_command.add_collect(command("collect", feedback_command.COLLECT, _plan))
    feedback_command.add_forget(command("forget", feedback_command.FORGET, _plan))
    command("plugins", plugins_command.HELP, lambda _: plugins_command.run())
    reference_command.add(command("schema", reference_command.HELP, reference_command.run), parser)
    convert_command.add(command("convert-reward", convert_command.HELP, convert_command.run))
    export = with_recipe("export", "write SFT and preference data for another trainer", _export)
    export.add_argument("--format", required=True, choices=("trl", "llamafactory", "openai"))
    export.add_argument("--to", required=True, metavar="DIR", help="folder or URI to write to")
    export.add_argument("--bare", action="store_true", help="leave the task prompt out of the messages")
    push_command.add(with_recipe("push", push_command.HELP, _push))
    serve = command("serve", "serve a trained policy behind an OpenAI-compatible endpoint", _serve)
    serve.add_argument(
        "checkpoint", help="a folder or URI that `vpo run` made, e.g. runs/laptop/checkpoints/dpo"
    )
    serve.add_argument("--recipe", help="recipe file whose `serve` section to use")
    serve.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. serve.port=9000"
    )
    serve.add_argument(
        "--config", action="store_true", help="print a Serve config file for `serve deploy` or a RayService"
    )
    deploy = with_recipe("deploy", "deploy the trained policy on a cluster's Ray Serve, and return", _deploy)
    deploy.add_argument("--checkpoint", help="another folder or URI than the run's last trained policy")
    deploy.add_argument(
        "--timeout", type=float, default=1800, metavar="S", help="for the replicas to load (%(default)g s)"
    )
    key = command("key", "make an API key: it is printed once, and the line for the file of keys", _key)
    key.add_argument("name", metavar="NAME", help="who will use it, as metrics and logs name the caller")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _shard(text: str) -> Shard:
    from vpo_ray.records import Shard

    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _load(arguments: argparse.Namespace) -> Recipe:
    from vpo_ray import api

    # As a JSON string, so that no name of a folder is read as another YAML value.
    given = arguments.out
    out = [] if given is None else [f"out={json.dumps(given, ensure_ascii=False)}"]
    return api.load_recipe(arguments.recipe, [*arguments.set, *out])


def _run(arguments: argparse.Namespace) -> int:
    from vpo_ray import api
    from vpo_ray.cli.summary import run_summary

    options = {"retry_errors": arguments.retry_errors, "verbose": arguments.verbose}
    run = api.run(_load(arguments), rounds=arguments.rounds, **options)
    if sys.stdout.isatty():
        sys.stdout.write(run_summary(run.dir))
    else:
        lines = run_summary(run.dir, most=1).splitlines(keepends=True)
        sys.stdout.writelines(line for line in lines if line.strip())
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    return plan_command.run(_load(arguments), arguments)


def _fetch(arguments: argparse.Namespace) -> int:
    return fetch_command.run(_load(arguments), arguments)


def _refine(arguments: argparse.Namespace) -> int:
    return refine_command.run(_load(arguments), arguments)


def _submit(arguments: argparse.Namespace) -> int:
    return submit_command.run(_load(arguments), arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from vpo_ray.cli import doctor
    from vpo_ray.stream.connection import connect

    recipe = _load(arguments) if arguments.recipe else None
    connect(arguments.verbose)
    return doctor.run(recipe, arguments.json)


def _tiny(arguments: argparse.Namespace) -> int:
    from vpo_ray.world.tiny import make_tiny

    make_tiny(arguments.folder)
    sys.stdout.write(f"tiny checkpoints are in {arguments.folder}\n")
    return 0


def _world(arguments: argparse.Namespace) -> int:
    from vpo_ray.world.make import make_world

    make_world(arguments.folder)
    sys.stdout.write(f"the world is in {arguments.folder}\n")
    return 0


def _phase(arguments: argparse.Namespace) -> int:
    from vpo_ray.loop.commands import run_phase

    recipe = _load(arguments)
    run_phase(recipe, arguments.name, getattr(arguments, "retry_errors", False), arguments.verbose)
    return _done(arguments.name, recipe)


def _generate(arguments: argparse.Namespace) -> int:
    """All candidate stages, or one."""
    from vpo_ray import api

    recipe, name, shard = _load(arguments), arguments.name, arguments.shard
    stages = None if name == "generate" else (name,)
    options = {"retry_errors": arguments.retry_errors, "verbose": arguments.verbose}
    api.generate(recipe, stages, shard=shard, **options)
    if shard is None:
        return _done(name, recipe)
    sys.stdout.write(f"{name}: shard {shard} is done; run it without --shard when all {shard.of} are\n")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from vpo_ray import api

    recipe, name = _load(arguments), arguments.name
    api.train(recipe, None if name == "train" else name, verbose=arguments.verbose)
    return _done(name, recipe)


def _evaluate(arguments: argparse.Namespace) -> int:
    return evaluate_command.run(_load(arguments), arguments)


def _report(arguments: argparse.Namespace) -> int:
    from vpo_ray.files.folder import StorageError
    from vpo_ray.loop.opening import open_run, write_ledger
    from vpo_ray.report import build_report
    from vpo_ray.storage.run_dir import RunDir

    recipe = _load(arguments)
    if not (found := RunDir(recipe.out)).exists("versions.json"):
        raise StorageError(f"{found.uri} is no run directory: it has no versions.json")
    # It looks on while another driver works, so it takes no lock.
    run = open_run(recipe)
    write_ledger(recipe, run)
    sys.stdout.write(f"report: done, see {build_report(run, recipe)}\n")
    return 0


def _done(name: str, recipe: Recipe) -> int:
    from vpo_ray.storage.run_dir import RunDir

    sys.stdout.write(f"{name}: done, see {RunDir(recipe.out).at('ledger.json')}\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from vpo_ray.files.folder import join
    from vpo_ray.loop.export import export
    from vpo_ray.storage.run_dir import RunDir

    recipe = _load(arguments)
    written = export(recipe, RunDir(recipe.out), arguments.format, arguments.to, arguments.bare)
    for name, rows in written.items():
        sys.stdout.write(f"{join(arguments.to, name)}: {rows} rows\n")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    return push_command.run(_load(arguments), arguments)


def _serve(arguments: argparse.Namespace) -> int:
    from vpo_ray import api
    from vpo_ray import recipe as recipes

    settings = recipes.load_serve(arguments.recipe, arguments.set)
    if arguments.config:
        from vpo_ray.evaluation.gates import require_evaluation
        from vpo_ray.serve.config import config_file

        checkpoint = recipes.locate(arguments.checkpoint)
        require_evaluation(checkpoint, settings.require)
        sys.stdout.write(config_file(checkpoint, settings))
        return 0
    api.serve(arguments.checkpoint, settings, verbose=arguments.verbose)
    return 0


def _deploy(arguments: argparse.Namespace) -> int:
    from vpo_ray import recipe as recipes
    from vpo_ray.evaluation.gates import require_evaluation
    from vpo_ray.serve.deploy import roll_out
    from vpo_ray.storage.run_dir import RunDir
    from vpo_ray.stream.connection import connect

    recipe = _load(arguments)
    checkpoint = arguments.checkpoint or RunDir(recipe.out).last_policy(recipe.learns or "sft")
    require_evaluation(recipes.locate(checkpoint), recipe.serve.require)
    connect(arguments.verbose)
    roll_out(recipes.locate(checkpoint), recipes.serve_of(recipe), arguments.timeout)
    sys.stdout.write(f"deployed {checkpoint} as {recipe.serve.model_name!r}\n")
    return 0


def _key(arguments: argparse.Namespace) -> int:
    from vpo_ray.serve.keys import make_key

    key, line = make_key(arguments.name)
    sys.stdout.write(f"key (shown this once): {key}\nline for serve.keys:  {line}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
