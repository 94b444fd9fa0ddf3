"""`vpo push`: a run's policy and its data to a Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpo_ray.recipe import Recipe

HELP = "put a run's policy, with its evaluation, and its data on a Hugging Face hub"


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo push` its options."""
    parser.add_argument("--policy", metavar="REPO", help="owner/name for the policy that was trained last")
    parser.add_argument("--data", metavar="REPO", help="owner/name for SFT data and pairs, as a data set")
    parser.add_argument("--public", action="store_true", help="make repositories that anybody may read")
    parser.add_argument("--license", default="other", metavar="ID", help="of the data (%(default)s)")


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Push what is named, and print where it is: the hub of HF_ENDPOINT, with the token of HF_TOKEN."""
    from vpo_ray.loop.push import PushError, push_data, push_policy
    from vpo_ray.storage.run_dir import RunDir

    if not arguments.policy and not arguments.data:
        raise PushError("name a repository: --policy OWNER/NAME, --data OWNER/NAME, or both")
    found, private = RunDir(recipe.out), not arguments.public
    if arguments.policy:
        sys.stdout.write(f"policy  {push_policy(recipe, found, arguments.policy, private)}\n")
    if arguments.data:
        sys.stdout.write(f"data    {push_data(recipe, found, arguments.data, private, arguments.license)}\n")
    return 0
