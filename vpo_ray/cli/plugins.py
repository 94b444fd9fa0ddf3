"""`vpo plugins`: which models a recipe can name here, of the package and of other installed packages."""

from __future__ import annotations

import sys

HELP = "list the rewards, video models and chat engines that a recipe can name here"


def run() -> int:
    """Print a line for each: its key and name, where it comes from, or why it cannot be imported."""
    from vpo_ray.recipe import ChatModel, Render, Reward
    from vpo_ray.recipe.plugins import BUILT_IN, Modelled, PluginError, entry_points, load_builder
    from vpo_ray.versions import versions

    ours = f"vpo-ray {versions().get('vpo-ray', 'without a package')}, built in"
    rows = []
    sections: dict[str, type[Modelled]] = {
        "reward.kind": Reward,
        "render.kind": Render,
        "judge.backend": ChatModel,
    }
    for key, section in sections.items():
        own = (*section.known, *BUILT_IN[section.group])
        rows += [(key, name, ours) for name in own]
        for name, points in sorted(entry_points(section.group).items()):
            for point in points:
                shown = f"{point.dist.name} {point.dist.version}, {point.value}"
                try:
                    plugin = load_builder(point.value)
                    shown += f"@{plugin.version}" if plugin.version != point.dist.version else ""
                except PluginError as error:
                    shown += f": {error}"
                shown += " (several packages have this name)" if points[1:] else ""
                shown += (
                    " (the package's own has this name)"
                    if name in (*section.known, *BUILT_IN[section.group])
                    else ""
                )
                rows.append((key, name, shown))
    width = max(len(name) for _, name, _ in rows)
    sys.stdout.writelines(f"{key:<14} {name:<{width}}  {shown}\n" for key, name, shown in rows)
    return 0
