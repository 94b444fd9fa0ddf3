"""Plan: check a recipe against the files that it names, and say what it will take, before Ray starts."""

from vpo_ray.plan.check import PlanError, check
from vpo_ray.plan.show import plan

__all__ = ["PlanError", "check", "plan"]
