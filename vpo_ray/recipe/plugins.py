"""Models of other people: what `kind` or `backend` of a recipe's section names, found and checked.

It is a name that the package knows, the name of an installed package's entry point, or
`package.module:builder`. A builder is called with the section and its options, and makes the model. It has
an attribute `Options`, the pydantic model of the section's `options`, and may have

- `version`, where the version of its package does not say what changes a result
- `identity(settings, options)`, where a result depends on more than these, such as the content of weights
- `checkpoints`, the keys (`model`, or those of `options`) that name checkpoints it loads; other keys of
  `Options` that are a `Source` name files
- `problems(settings, options)`, what is wrong with the section or these files, a sentence each, for the plan
- `variables(settings, options)`, the environment variables that it reads where it runs, such as keys
- `takes_account`: true where it pays for what it asks; it is then called with the run's account too

To name a builder is to run its module, as with `trust_remote_code`: nothing is fetched, and a module is found
where Python finds any other. A recipe that is loaded gets the builder and its version written into it, as
`package.module:builder@version`: so they are in fingerprints and ids, and a node with another version refuses
to work.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, PydanticUserError, ValidationError, create_model

from vpo_ray.recipe.base import Section, locate, sources

# Names of the package's own models that come in by the same door, by group of entry points.
BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "vpo_ray.rewards": {
        "generative": "vpo_ray.engines.reward.generative:Generative",
        "http": "vpo_ray.engines.reward.http_scorer:HttpScorer",
        "text": "vpo_ray.engines.reward.prompt_text:PromptText",
        "laion_aesthetic": "vpo_ray.engines.reward.laion_aesthetic:LaionAesthetic",
        "mps": "vpo_ray.engines.reward.mps:Mps",
        "videoscore": "vpo_ray.engines.reward.videoscore:VideoScore",
        "videoreward": "vpo_ray.engines.reward.videoreward:VideoReward",
    },
    "vpo_ray.video": {},
    "vpo_ray.chat": {},
}

# What a model has, of every mapping one, by the number of arguments that it is given (None: whatever
# `VideoModel` has); and the class that says what each does.
_INTERFACES: Mapping[str, tuple[str, tuple[Mapping[str, int | None], ...]]] = {
    "vpo_ray.rewards": ("engines.reward.RewardModel", ({"score": 2, "score_prompts": 2},)),
    "vpo_ray.video": (
        "engines.video.VideoModel",
        ({"render": 2}, {"animate_files": None}, {"warm_up": None}, {"cut": None}, {"stored": None}),
    ),
    "vpo_ray.chat": ("engines.chat.Chat", ({"complete": 3},)),
}
# What a builder may have, each called with the section and its options.
_ASKED = ("problems", "variables", "identity", "dimensions")

_NAME = re.compile(r"(?P<name>[\w.-]+|[\w.]+:[\w.]+)(@(?P<version>[\w.!+-]+))?")


class PluginError(ValueError):
    """A model that cannot be found, imported, configured or built here; the message says why."""

    stops_run = True  # see pools.STOP


def _named(kind: str) -> str:
    if not _NAME.fullmatch(kind):
        raise ValueError(f"{kind!r} is no name and no package.module:builder")
    return kind


Kind = Annotated[str, AfterValidator(_named)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Modelled(Section):
    """A section whose model may be another's.

    `options` are for a model that the package does not know, which says what they may be.
    """

    options: dict[str, Any] = {}

    # The group of entry points, the names that the package knows, and the key that has the name.
    group: ClassVar[str]
    known: ClassVar[tuple[str, ...]]
    key: ClassVar[str] = "kind"

    @property
    def named(self) -> str:
        name: str = getattr(self, self.key)
        return name

    @property
    def is_plugin(self) -> bool:
        return self.named not in self.known


@dataclass(frozen=True)
class Plugin:
    """A builder that was found. `target` is its `package.module:builder`, whatever name led to it."""

    target: str
    version: str
    builder: Any

    @property
    def pin(self) -> str:
        return f"{self.target}@{self.version}"

    def options(self, given: Mapping[str, Any]) -> BaseModel:
        """Raises pydantic's ValidationError, also for an option that is not known."""
        model: type[BaseModel] = self.builder.Options
        if model.model_config.get("extra") is None:
            create_model(model.__name__, __base__=(_Strict, model)).model_validate(given)
        return model.model_validate(given)

    def identity(self, section: Modelled) -> str:
        """The builder, its version and what it says that a result depends on; where it says nothing, the
        names of the weights in the section. Raises PluginError."""
        if (more := getattr(self.builder, "identity", None)) is not None:
            return f"{self.pin}+{self._asked(more, section)}"
        weights = section.model_dump(include={"model", "revision", "version", "lora"}, exclude_defaults=True)
        return f"{self.pin}+{json.dumps(weights, sort_keys=True)}" if weights else self.pin

    def models(self, section: Modelled) -> dict[str, str]:
        """The checkpoints that are loaded where it runs, by key: `model`, `options.clip`."""
        named = self.named_sources(section)
        keys = [
            key if key == "model" else f"options.{key}" for key in getattr(self.builder, "checkpoints", ())
        ]
        return {key: named[key] for key in keys if key in named}

    def files(self, section: Modelled) -> dict[str, str]:
        """The other files that its options name, by key."""
        models = self.models(section)
        return {k: path for k, path in self.named_sources(section).items() if k not in ("model", *models)}

    def located(self, section: Modelled) -> dict[str, Any]:
        """The section's options with absolute paths."""
        named = {key.removeprefix("options."): path for key, path in self.named_sources(section).items()}
        return section.options | {key: locate(named[key]) for key in section.options if key in named}

    def named_sources(self, section: Modelled) -> dict[str, str]:
        """Every path, URI and hub id that is in the section's options or its `model`, by key."""
        found = dict(sources(self.checked(section), "options."))
        return found | ({"model": model} if (model := getattr(section, "model", "")) else {})

    def problems(self, section: Modelled) -> list[str]:
        """What is wrong with the section and the files that it names. Raises PluginError for options that the
        builder does not take."""
        self.checked(section)
        wrong = [*self._miscalled()]
        if isinstance(self.builder, type):
            wrong += [*self._lacks(section, self.builder), *self._misdefined(section)]
        return wrong or self._listed("problems", section) or []

    def variables(self, section: Modelled) -> list[str]:
        """The environment variables that it reads where it runs. Raises PluginError."""
        return self._listed("variables", section) or []

    def dimensions(self, section: Modelled) -> frozenset[str] | None:
        """The names of a reward's dimensions, which its builder may have or say of its settings. Raises
        PluginError where it cannot say them of these."""
        given = getattr(self.builder, "dimensions", None)
        found = self._asked(given, section) if callable(given) else given
        return None if found is None else frozenset([found] if isinstance(found, str) else found)

    def build(self, section: Modelled, account: Any = None) -> Any:
        """The model. Raises PluginError where it cannot be built, whatever the builder raises.

        Args:
            account: for a builder that takes one.
        """
        if wrong := self.problems(section):
            raise PluginError(f"{self.pin}: {'; '.join(wrong)}")
        paid = (account,) if getattr(self.builder, "takes_account", False) else ()
        model = self._asked(self.builder, section, *paid)
        if lacks := self._lacks(section, model):
            raise PluginError(f"{self.pin}: {lacks[0]}")
        return model

    def _miscalled(self) -> Iterator[str]:
        """What of the builder does not take the arguments that it is called with."""
        paid = 1 if getattr(self.builder, "takes_account", False) else 0
        if (fault := _fault_of_call(self.builder, 2 + paid)) is not None:
            yield f"it is called with (settings, options{', account' * paid}): {fault}"
        for name in _ASKED:
            part = getattr(self.builder, name, None)
            if callable(part) and (fault := _fault_of_call(part, 2)) is not None:
                yield f"{name} is called with (settings, options), and no self, as a @staticmethod: {fault}"

    def _misdefined(self, section: Modelled) -> Iterator[str]:
        """Which methods of a class do not take what a run gives them."""
        for names in _INTERFACES[section.group][1]:
            for name, count in names.items():
                method = inspect.getattr_static(self.builder, name, None)
                if count is None or not inspect.isfunction(method):
                    continue
                if (fault := _fault_of_call(method, count + 1)) is not None:
                    yield f"{name} is given {count} arguments: {fault}"

    def _lacks(self, section: Modelled, model: Any) -> list[str]:
        """What a model, or its class, has to have and has not; nothing where that is made when asked for."""
        if hasattr(model, "__getattr__"):
            return []
        interface, parts = _INTERFACES[section.group]
        missing = [" or ".join(names) for names in parts if not any(hasattr(model, n) for n in names)]
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        advice = f"let it have what vpo_ray.{interface} has, or inherit from that"
        return [f"{name} has no {', '.join(missing)}: {advice}"] if missing else []

    def checked(self, section: Modelled) -> BaseModel:
        """The section's options. Raises PluginError for those that the builder does not take."""
        try:
            return self.options(section.options)
        except ValidationError as error:
            where = "; ".join(f"options.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise PluginError(f"{self.pin}: {where}") from error

    def _listed(self, name: str, section: Modelled) -> list[str] | None:
        """What an attribute of the builder says; None where it has no such."""
        ask = getattr(self.builder, name, None)
        if ask is None:
            return None
        found: list[str] = self._asked(lambda section, options: _sentences(ask(section, options)), section)
        return found

    def _asked(self, part: Any, section: Modelled, *more: Any) -> Any:
        options = self.checked(section)
        try:
            return part(section, options, *more)
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.pin}: {type(error).__name__}: {error}") from error


def _fault_of_call(part: Any, count: int) -> str | None:
    """Why something cannot be called with so many arguments, or None."""
    try:
        inspect.signature(part).bind(*[None] * count)
    except TypeError as error:
        return str(error)
    except ValueError:  # written in C, which says nothing of its arguments
        return None
    return None


def _sentences(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def find(section: Modelled) -> Plugin:
    """The builder that a section names.

    Raises:
        PluginError: it is not installed here, cannot be imported or is no builder, or has another version
            than the one behind `@`.
    """
    match = _NAME.fullmatch(section.named)
    assert match is not None, section.named
    name, version = match["name"], match["version"]
    plugin = load_builder(name if ":" in name else _target(section, name))
    if version not in (None, plugin.version):
        raise PluginError(f"{name} has version {plugin.version} here, and not {version}")
    return plugin


def find_usable(section: Modelled) -> Plugin | None:
    """The builder of a section whose model is not of its known kinds; None where it is not installed or
    refuses the section's options, which the plan and the node that needs it say."""
    if not section.is_plugin:
        return None
    try:
        plugin = find(section)
        plugin.checked(section)
    except PluginError:
        return None
    return plugin


@cache
def load_builder(target: str) -> Plugin:
    """The builder at `package.module:builder`. Raises PluginError."""
    name, _, path = target.partition(":")
    try:
        with redirect_stdout(sys.stderr):  # what a command writes is for programs, too
            module = import_module(name)
        builder = attrgetter(path)(module)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        reason = f"{type(error).__name__}: {error}{_not_on_the_path(name, error)}"
        raise PluginError(f"{target} cannot be imported: {reason}") from error
    options: Any = getattr(builder, "Options", None)
    described = isinstance(options, type) and issubclass(options, BaseModel) and options is not BaseModel
    if not callable(builder) or not described:
        raise PluginError(
            f"{target} is no builder: it is called with (settings, options), and has an attribute `Options`, "
            "a class of pydantic's BaseModel"
        )
    try:
        options.model_rebuild()
    except (PydanticUserError, NameError) as error:
        raise PluginError(f"{target}: its Options: {str(error).splitlines()[0]}") from error
    version = getattr(builder, "version", None) or _version(module)
    if not isinstance(version, str) or not re.fullmatch(r"[\w.!+-]+", version):
        raise PluginError(f"{target}: its version {version!r} is no string of letters, digits and .!+-")
    return Plugin(target, version, builder)


def _not_on_the_path(name: str, error: BaseException) -> str:
    """What to do about a module that is in the working directory, where `vpo` does not look."""
    top = name.partition(".")[0]
    if getattr(error, "name", None) != top or not (Path(f"{top}.py").is_file() or Path(top).is_dir()):
        return ""
    return " on Python's path. It is in the working directory: set PYTHONPATH=. or install it"


def entry_points(group: str) -> dict[str, list[Any]]:
    """What installed packages offer in a group, by name: more than one is a clash."""
    from importlib import metadata

    found: dict[str, list[Any]] = {}
    for point in metadata.entry_points(group=group):
        same = found.setdefault(point.name, [])
        # An editable install is on the path twice.
        if point.value not in [other.value for other in same]:
            same.append(point)
    return found


def _target(section: Modelled, name: str) -> str:
    if (ours := BUILT_IN[section.group].get(name)) is not None:
        return ours
    offered = entry_points(section.group)
    points = offered.get(name, [])
    if len(points) > 1:
        targets = " and ".join(point.value for point in points)
        raise PluginError(f"{name} is offered by {targets}: write the one that is meant instead of the name")
    if not points:
        names = ", ".join([*section.known, *BUILT_IN[section.group], *sorted(offered)])
        raise PluginError(
            f"{name!r} is no {section.key} that is known here ({names}): no installed package has an entry "
            f"point of this name in {section.group}"
        )
    value: str = points[0].value
    return value


def _version(module: Any) -> str:
    """That of the package which the module came with; where there is none, of the module's own text."""
    from importlib import metadata

    packages = set(metadata.packages_distributions().get(module.__name__.partition(".")[0], []))
    if len(packages) == 1:
        return metadata.version(packages.pop())
    try:
        with open(module.__file__, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except (OSError, TypeError, AttributeError) as error:
        raise PluginError(f"{module.__name__} has no file and no version: give its builder one") from error


def plugins_of(section: Section, prefix: str = "") -> dict[str, Modelled]:
    """The parts of a recipe whose model the package does not know, by the key that names it."""
    found: dict[str, Modelled] = {}
    if isinstance(section, Modelled) and section.is_plugin:
        found[f"{prefix}{section.key}"] = section
    for name in type(section).model_fields:
        value = getattr(section, name)
        inner = {f"{name}.": value} if isinstance(value, Section) else {}
        if isinstance(value, Mapping):
            inner = {f"{name}.{key}.": part for key, part in value.items() if isinstance(part, Section)}
        for path, part in inner.items():
            found |= plugins_of(part, prefix + path)
    return found


def plugin_sources(section: Section) -> dict[str, str]:
    """What the options of plugins in a section name, by dotted key, as `base.sources` has it of the rest."""
    found: dict[str, str] = {}
    for key, part in plugins_of(section).items():
        if (plugin := find_usable(part)) is not None:
            prefix = key.removesuffix(part.key)
            named = plugin.named_sources(part)
            found |= {prefix + name: path for name, path in named.items() if name != "model"}
    return found


def plugin_problems(plugins: Mapping[str, Modelled]) -> dict[str, str]:
    """What is wrong with them on this machine, by the key that names it."""
    found = {}
    for key, section in plugins.items():
        try:
            if wrong := find(section).problems(section):
                found[key] = "; ".join(wrong)
        except PluginError as error:
            found[key] = str(error)
    return found


def pins(plugins: Mapping[str, Modelled]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The builder and version of those that are installed here, by the key that names them, and pydantic's
    errors of options that they do not take, with `loc` from the top of the recipe. What is not here is left
    to the plan and the node that needs it."""
    found: dict[str, str] = {}
    errors: list[dict[str, Any]] = []
    for key, section in plugins.items():
        try:
            plugin = find(section)
        except PluginError:
            continue
        found[key] = plugin.pin
        try:
            plugin.options(section.options)
        except ValidationError as error:
            where, known = (*key.split(".")[:-1], "options"), list(plugin.builder.Options.model_fields)
            errors += [{**e, "loc": (*where, *e["loc"]), "known": known} for e in error.errors()]
    return found, errors
