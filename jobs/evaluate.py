"""What `ray job submit` takes: policies side by side, as the `evaluate` section of the recipe says.

    ray job submit --working-dir . -- python jobs/evaluate.py --recipe jobs/recipes/tiny.yaml

Submitted again after a failure, it goes on where it stopped.
Its options and exit status are those of `vpo evaluate`.
"""

from vpo_ray.cli import job

if __name__ == "__main__":
    raise SystemExit(job("evaluate"))
