"""The `vpo` command: `main` is the table of commands; those of more than a few lines have a module each."""

from vpo_ray.cli.main import job, main

__all__ = ["job", "main"]
