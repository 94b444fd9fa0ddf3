"""What `ray job submit` takes: the trained policy behind an endpoint, on the cluster that the job runs on.

    ray job submit --working-dir . -- python jobs/serve_deploy.py --recipe jobs/recipes/tiny.yaml

The job ends when the endpoint answers, and the endpoint stays. Submitted again it changes nothing, or
rolls out what is new. Its options and exit status are those of `vpo deploy`.
"""

from vpo_ray.cli import job

if __name__ == "__main__":
    raise SystemExit(job("deploy"))
