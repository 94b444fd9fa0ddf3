"""Routes of the endpoint, and metrics, for the page of `vpo schema --markdown`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Makes the lines of a section: its name, what it is, where it stands, and its JSON schema.
Section = Callable[[str, str, list[str], Mapping[str, Any]], Iterator[str]]

_BODY = ("requestBody", "content", "application/json", "schema")
_REF = "#/components/schemas/"


def route_pages(section: Section) -> Iterator[str]:
    """Every route with the bodies that it takes and gives, as lines of Markdown."""
    from vpo_ray.serve.ingress import http
    from vpo_ray.serve.request import RequestBody

    document = http.openapi()
    schemas: dict[str, Mapping[str, Any]] = document["components"]["schemas"]
    takes = {model.__name__: model for model in RequestBody.__subclasses__()}
    shown: dict[str, list[str]] = {}
    yield "## Routes"
    yield ""
    yield "Of `vpo serve`. Errors have OpenAI's form: `error`, with `message`, `type`, `param` and `code`."
    yield ""
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            name = f"{method.upper()} {path}"
            asked = _inside(route, *_BODY).get("title")
            status, answer = next(iter(route["responses"].items()))
            given = list(_named(_inside(answer, "content", "application/json", "schema")))
            for model in filter(None, [asked, *given]):
                shown.setdefault(model, []).append(name)
            bodies = [f"takes [{asked}](#{asked.lower()})"] if asked else []
            answers = " or ".join(f"[{model}](#{model.lower()})" for model in given)
            bodies.append(f"answers {status}" + (f" with {answers}" if answers else ""))
            yield f"- `{name}` {', '.join(bodies)}. {_one_line(route['description'])}"
    yield ""
    for model in list(shown):
        table = takes[model].model_json_schema() if model in takes else schemas[model]
        for inner in _named(table):
            shown.setdefault(inner, [])
    for model, routes in shown.items():
        table = takes[model].model_json_schema() if model in takes else schemas.get(model, {})
        if "properties" in table:
            yield from section(model, table.get("description", ""), routes, table)
            yield ""


def metric_pages() -> Iterator[str]:
    """Every metric, as lines of Markdown."""
    from vpo_ray.metrics import SERVING, STAGES

    yield "## Metrics"
    yield ""
    yield "Ray exports them on every node in Prometheus' format, with `ray_` before their names."
    yield ""
    yield "| metric | kind | labels | meaning |"
    yield "|---|---|---|---|"
    for metric in (*STAGES.values(), *SERVING.values()):
        labels = ", ".join(f"`{tag}`" for tag in metric.tags)
        yield f"| `{metric.name}` | {metric.kind.lower()} | {labels} | {metric.text} |"
    yield ""


def _inside(value: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for key in path:
        value = value.get(key) or {}
    return value


def _named(schema: Any) -> Iterator[str]:
    """The models that a schema refers to."""
    if isinstance(schema, Mapping):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference.rpartition("/")[2]
        for value in schema.values():
            yield from _named(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _named(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
