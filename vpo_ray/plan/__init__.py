"""Plan: check a recipe against the files that it names, and say what it will take, before Ray starts.

vpo plan recipe.yaml --gpus 16 --gpu-type H100 --cpus 128 --price-per-gpu-hour 2.5

`check` finds what is missing, `cluster` knows nodes, `figures` finds times and sizes, `balance`
sizes the pools, `estimate` puts them together and `show` prints.
"""

from vpo_ray.plan.check import PlanError, check_recipe
from vpo_ray.plan.estimate import Plan, plan

__all__ = ["Plan", "PlanError", "check_recipe", "plan"]
