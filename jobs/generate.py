"""What `ray job submit` takes: curation to scoring, on GPUs that may be taken away.

    ray job submit --working-dir . -- python jobs/generate.py --recipe jobs/recipes/tiny.yaml

Submitted again after a failure, it goes on where it stopped.
Its options and exit status are those of `vpo generate`.
"""

from vpo_ray.cli import job

if __name__ == "__main__":
    raise SystemExit(job("generate"))
