"""`vpo init`: ask what is wanted, or take it by options, and write a recipe that `vpo plan` accepts."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vpo_ray.cli.init_recipe import JUDGE, POLICY, REWARDS, SERVICE, VIDEO, ChoiceError, Choices, recipe_text

HELP = "ask what is wanted, or take it by options, and write a recipe"
_QUERIES = "queries.jsonl"


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo init` its options."""
    parser.add_argument("recipe", nargs="?", default="recipe.yaml", help="file to write (%(default)s)")
    parser.add_argument(
        "--example", metavar="NAME", help="write a shipped recipe, e.g. laptop, and ask nothing"
    )
    parser.add_argument(
        "--video", metavar="MODEL", help=f"a preset such as {VIDEO}, or {SERVICE} for a service"
    )
    parser.add_argument("--reward", choices=REWARDS, help="what scores videos")
    parser.add_argument(
        "--judge", metavar="LLM", help="hub id or folder; a name without / is an endpoint's model"
    )
    parser.add_argument("--policy", metavar="LLM", help="hub id or folder of the LLM to train")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of 80 GB, all nodes together")
    parser.add_argument("--queries", metavar="FILE", help="your users' queries")
    parser.add_argument(
        "--models", metavar="DIR", default="./models", help="for what has no hub id (%(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="run directory or URI (runs/NAME of the recipe)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def run(arguments: argparse.Namespace) -> int:
    """Write the recipe and say what to do next.

    Raises:
        ChoiceError: the options do not go together, or a file is there already.
    """
    from vpo_ray.recipe import load
    from vpo_ray.recipe.file import RecipeError, shipped_recipes

    path = Path(arguments.recipe).expanduser()
    if path.exists() and not arguments.force:
        raise ChoiceError(f"{path} is there already: name another file, or give --force")
    if arguments.example:
        ours = shipped_recipes()
        if arguments.example not in ours:
            raise ChoiceError(f"--example {arguments.example}: no such recipe; there are {', '.join(ours)}")
        text = ours[arguments.example].read_text("utf-8")
    else:
        # The recipe's paths are those of where it is used, which is here.
        examples = path.parent / Choices.examples
        text = recipe_text(replace(_chosen(arguments, path.stem), examples=str(examples)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        if not arguments.example:
            _copy_examples(examples)
        recipe = load(path)
    except OSError as error:
        raise ChoiceError(f"cannot write {path}: {error}") from error
    except RecipeError as error:
        raise ChoiceError(f"{error}\nthe recipe is written, and has to be corrected by hand") from error
    sys.stdout.write("\n".join([f"wrote {path}", *_next_steps(path, recipe, arguments.example)]) + "\n")
    return 0


def _chosen(arguments: argparse.Namespace, name: str) -> Choices:
    """The choices by options; what they leave open is asked on a terminal, and has its default elsewhere."""
    from vpo_ray.recipe import video_presets

    queries = arguments.queries or _QUERIES
    # A path of two parts would be taken for a hub id.
    models = arguments.models if "/" in arguments.models else f"./{arguments.models}"
    choices = Choices(name, arguments.out or f"runs/{name}", queries, models=models)
    questions: dict[str, tuple[str, str]] = {
        "queries": ("File of your users' queries", queries),
        "video": (f"Video model ({', '.join([*video_presets(), SERVICE])})", VIDEO),
        "policy": ("LLM to train, a hub id or folder", POLICY),
        "judge": ("LLM that judges: hub id or folder, or an endpoint's model such as gpt-4o", JUDGE),
        "reward": (f"What scores videos ({', '.join(REWARDS)})", REWARDS[0]),
        "gpus": ("GPUs, all nodes together", "8"),
    }
    asks = sys.stdin is not None and sys.stdin.isatty()
    for key, (question, default) in questions.items():
        given = getattr(arguments, key)
        if given is None:
            given = _ask(question, default) if asks else default
        value: Any = given
        if key == "gpus":
            try:
                value = int(given)
            except ValueError:
                raise ChoiceError(f"--gpus: {given!r} is no number") from None
        choices = replace(choices, **{key: value})
    if choices.video not in (*video_presets(), SERVICE):
        known = ", ".join([*video_presets(), SERVICE])
        raise ChoiceError(f"--video {choices.video}: no such preset; there are {known}")
    if choices.reward not in REWARDS:
        raise ChoiceError(f"--reward {choices.reward}: choose one of {', '.join(REWARDS)}")
    return choices


def _ask(question: str, default: str) -> str:
    sys.stderr.write(f"{question} [{default}]: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip() or default


def _copy_examples(target: Path) -> None:
    """The package's examples of good prompts, beside the recipe that names them."""
    if not target.exists():
        shutil.copyfile(Path(__file__).parents[1] / "data" / "sft.jsonl", target)


def _next_steps(path: Path, recipe: object, example: str | None) -> Iterator[str]:
    from vpo_ray.plan.show import published_line
    from vpo_ray.recipe import Recipe
    from vpo_ray.recipe.published import downloads

    assert isinstance(recipe, Recipe)
    if example == "laptop":
        yield "next: vpo world runs/world, which makes what it names; then"
    elif example == "tiny":
        yield "next: vpo tiny runs/tiny, which makes its checkpoints; then"
    else:
        wanted, own = downloads(recipe)
        if wanted:
            yield f"to download, by vpo fetch {shlex.quote(str(path))}:"
        yield from (f"  {published_line(each)}" for each in wanted)
        yield from (f"to bring: {key}: {name}" for key, name in own.items())
        yield "next:"
    yield f"  vpo plan {shlex.quote(str(path))}"
    yield f"  vpo run {shlex.quote(str(path))}"
