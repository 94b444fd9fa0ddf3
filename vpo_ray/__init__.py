"""Prompt optimisers for text-to-video models: preference data, training and serving on Ray.

    import vpo_ray

    recipe = vpo_ray.load_recipe("recipe.yaml", ["sample.k=8"])
    run = vpo_ray.run(recipe)
    run.pandas("pairs")
    vpo_ray.optimise(run.checkpoint(), ["a cat on a skateboard"])

This is the Python API (docs/python.md), which the `vpo` command uses too. Everything is imported when it
is used, so that `import vpo_ray` takes no time.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpo_ray.api import evaluate, generate, load_recipe, plan, refine, run, serve, train
    from vpo_ray.engines.chat.batch import Optimised, optimise
    from vpo_ray.recipe import Recipe
    from vpo_ray.stages.spec import StageSpec, register
    from vpo_ray.storage.run import Run

__all__ = [
    "Optimised", "Recipe", "Run", "StageSpec", "evaluate", "generate", "load_recipe", "optimise", "plan",
    "refine", "register", "run", "serve", "train",
]  # fmt: skip

# Names that are given out as they are: where they are defined.
_LAZY = {
    "Optimised": "vpo_ray.engines.chat.batch",
    "Recipe": "vpo_ray.recipe",
    "Run": "vpo_ray.storage.run",
    "StageSpec": "vpo_ray.stages.spec",
    "evaluate": "vpo_ray.api",
    "generate": "vpo_ray.api",
    "load_recipe": "vpo_ray.api",
    "optimise": "vpo_ray.engines.chat.batch",
    "refine": "vpo_ray.api",
    "register": "vpo_ray.stages.spec",
    "run": "vpo_ray.api",
}


# These are packages too, and Python binds a package here when it is imported: `vpo_ray.plan` is always the
# package, which is called as the function.
_OF_PACKAGES = ("plan", "serve", "train")


def __getattr__(name: str) -> Any:
    if name in _OF_PACKAGES:
        return importlib.import_module(f"vpo_ray.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'vpo_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Module(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_PACKAGES:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled by reference, as other modules are.
        return importlib.import_module, (self.__name__,)


class _CallableModule(ModuleType):
    """A package that is called as the API's function of its name."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        function = getattr(importlib.import_module("vpo_ray.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **keywords)

    __reduce__ = _Module.__reduce__


sys.modules[__name__].__class__ = _Module
