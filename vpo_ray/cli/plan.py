"""`vpo plan`: its options, and the cluster that they describe."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpo_ray.recipe import Recipe

INCOMPLETE = 5  # the exit status of a plan without all files; see reference.EXIT_STATUS


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo plan` its options."""
    shape = parser.add_argument_group("cluster", "what the recipe is to run on: described, or a running one")
    shape.add_argument("--gpus", type=int, metavar="N", help="GPUs, all nodes together")
    shape.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of a node, 8 by default")
    shape.add_argument("--gpu-type", metavar="TYPE", help="as Ray calls it: H100, A100-80G, L40S, ...")
    shape.add_argument(
        "--cpus", type=int, metavar="N", help="CPUs, all nodes together; not checked if absent"
    )
    shape.add_argument(
        "--address", help="take the shape of a running Ray cluster; auto: the one on this machine"
    )
    parser.add_argument(
        "--ledger", metavar="PATH", help="run directory or ledger.json of a past run to take times from"
    )
    parser.add_argument(
        "--queries", type=int, metavar="N", help="plan for so many queries, where the list is not here"
    )
    parser.add_argument("--price-per-gpu-hour", type=_price, metavar="PRICE", help="in any currency")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Print the plan. Returns 0, or 5 where something that the recipe names is not on this machine.

    Raises:
        PlanError, ClusterError: there can be no plan.
    """
    from vpo_ray import api
    from vpo_ray.plan import cluster, show
    from vpo_ray.plan.check import check_nodes

    described = [arguments.gpus, arguments.cpus, arguments.gpu_type, arguments.gpus_per_node]
    shape: cluster.Cluster | None = None
    if arguments.address is not None:
        if any(value is not None for value in described):
            raise cluster.ClusterSpecError("give --address or a described cluster, not both")
        shape = cluster.live(arguments.address, lambda: check_nodes(recipe))
    elif arguments.gpus is not None or arguments.cpus is not None:
        shape = cluster.described(
            arguments.gpus or 0, arguments.gpu_type, arguments.cpus, arguments.gpus_per_node
        )
    elif any(value is not None for value in described):
        raise cluster.ClusterSpecError("--gpu-type and --gpus-per-node describe a cluster: give --gpus too")
    taken = {"queries": arguments.queries, "incomplete": True}
    made = api.plan(recipe, shape, arguments.ledger, arguments.price_per_gpu_hour, **taken)
    output = json.dumps(show.as_json(made), indent=2) + "\n" if arguments.json else show.text(made)
    sys.stdout.write(output)
    return INCOMPLETE if made.missing else 0


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no price")
    return price
