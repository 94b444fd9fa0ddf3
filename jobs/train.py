"""What `ray job submit` takes: SFT and, once generation is done, DPO, on GPUs that stay.

    ray job submit --working-dir . -- python jobs/train.py --recipe jobs/recipes/tiny.yaml

What is trained already is not trained again, and a phase goes on from its last checkpoint.
Its options and exit status are those of `vpo train`.
"""

from vpo_ray.cli import job

if __name__ == "__main__":
    raise SystemExit(job("train"))
