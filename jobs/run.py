"""What `ray job submit` takes: the whole loop of a recipe, on the cluster that the job runs on.

    ray job submit --working-dir . -- python jobs/run.py --recipe jobs/recipes/tiny.yaml

Submitted again after a failure, it goes on where it stopped; its exit status is that of `vpo run`.
"""

from __future__ import annotations

import argparse

from vpo_ray.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="recipe file, relative to the working directory")
    parser.add_argument("--out", help="run directory or URI that every node reaches")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--retry-errors", action="store_true", help="take rows that failed once more")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="rounds of the loop")
    options = parser.parse_args()
    arguments = ["run", options.recipe, "--rounds", str(options.rounds)]
    if options.out:
        arguments += ["--out", options.out]
    for item in options.set:
        arguments += ["--set", item]
    raise SystemExit(main(arguments + ["--retry-errors"] * options.retry_errors))
