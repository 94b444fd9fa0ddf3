"""What `ray job submit` takes: the whole loop of a recipe.

    ray job submit --working-dir . -- python jobs/run.py --recipe jobs/recipes/tiny.yaml

Submitted again after a failure, it goes on where it stopped.
Its options and exit status are those of `vpo run`.
"""

from vpo_ray.cli import job

if __name__ == "__main__":
    raise SystemExit(job("run"))
