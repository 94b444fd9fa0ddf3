"""`vpo evaluate`: policies side by side, and what a release may depend on."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpo_ray.recipe import Recipe


def add(parser: argparse.ArgumentParser) -> None:
    gates = parser.add_argument_group("gates, with exit status 4 where one is not passed")
    gates.add_argument(
        "--fail-below",
        action="append",
        default=[],
        metavar="[SET/POLICY/]METRIC=VALUE",
        help="of the last policy on every set where neither is given, e.g. verdict.aligned=0.93",
    )
    gates.add_argument("--no-worse-than", metavar="FILE", help="results.json of an earlier evaluation")
    gates.add_argument(
        "--by", type=float, default=0.0, metavar="X", help="what may be lost there (%(default)g)"
    )
    vbench = parser.add_argument_group("VBench's own command")
    vbench.add_argument(
        "--export", choices=("vbench",), help="write the videos under the names that it reads"
    )
    vbench.add_argument("--to", metavar="DIR", help="folder or URI to write them to")
    vbench.add_argument(
        "--import-vbench",
        action="append",
        default=[],
        metavar="FILE",
        help="add the measures of a results file of VBench, or of a folder of them",
    )


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Evaluate, print the table, and say where the rest is. Raises GateError where a gate is not passed."""
    from vpo_ray import api
    from vpo_ray.evaluation import gates
    from vpo_ray.evaluation.results_table import log_text, table_text
    from vpo_ray.evaluation.vbench_files import export_vbench
    from vpo_ray.recipe import RecipeError
    from vpo_ray.report.examples import examples_text, pick_examples

    if (arguments.export is None) != (arguments.to is None):
        raise RecipeError("--export and --to go together")
    # Read first: what it takes hours to compute is not in vain for a wrong path or limit.
    for limit in arguments.fail_below:
        gates.parse_limit(limit)
    earlier = gates.read_results(arguments.no_worse_than) if arguments.no_worse_than is not None else None
    done = api.evaluate(
        recipe,
        vbench=arguments.import_vbench,
        retry_errors=arguments.retry_errors,
        verbose=arguments.verbose,
    )
    samples = done.samples()
    if sys.stdout.isatty():
        width = shutil.get_terminal_size((100, 24)).columns
        examples = examples_text(pick_examples(done.results, samples), width)
        sys.stdout.write(f"{table_text(done.results, width)}\n{examples}\n")
    else:  # the report has the intervals and the examples
        sys.stdout.write(log_text(done.results))
    if arguments.export is not None:
        counts = export_vbench(samples, done.queries, arguments.to)
        sys.stdout.write(
            f"vbench   {counts['written']} videos, {counts['left_out']} left out: {arguments.to}\n"
        )
    sys.stdout.write(f"report   {done.folder.at('report.html')}, beside results.json\n")
    reasons = gates.below(done.results, arguments.fail_below)
    if earlier is not None:
        reasons += gates.worse(done.results, earlier, arguments.by)
    gates.must_pass(reasons)
    return 0
