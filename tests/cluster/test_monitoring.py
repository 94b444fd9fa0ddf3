"""The dashboard and the alerts ask for metrics that exist, with labels that they have."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from vpo_ray.metrics import SERVING, STAGES

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "cluster/grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboard.json").read_text("utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((GRAFANA / "alerts.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
METRIC = re.compile(r"\bray_\w+")
# What Ray adds to every series, or Prometheus to a histogram.
COMMON = {"SessionName", "instance", "le"}


def ours() -> dict[str, tuple[str, set[str]]]:
    """Our metrics as Ray exports them: kind and tags by name."""
    endings = {"Counter": "_total", "Gauge": "", "Histogram": "_bucket"}
    return {
        f"ray_{metric.name}{endings[metric.kind]}": (metric.kind, set(metric.tags))
        for metric in (*STAGES.values(), *SERVING.values())
    }


@cache
def rays() -> set[str]:
    """The metrics of Ray's own dashboards."""
    folder = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    return {name for path in folder.glob("*.py") for name in METRIC.findall(path.read_text("utf-8"))}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


@pytest.mark.parametrize(("where", "expr"), expressions())
def test_every_metric_exists(where: str, expr: str) -> None:
    names = set(METRIC.findall(expr))
    assert names
    for name in names:
        if name.startswith("ray_vpo_"):
            kind, tags = ours()[name]
            for selector in re.findall(rf"{name}{{(.*?)}}", expr):
                assert set(re.findall(r"(\w+)=", selector)) <= tags | COMMON, where
            assert kind != "Counter" or re.search(rf"(rate|increase)\({name}", expr), (
                f"{where}: {name} only grows"
            )
        else:
            assert name in rays(), f"{where}: {name} is none of Ray's"


@pytest.mark.parametrize(("where", "expr"), expressions())
def test_what_is_grouped_by_is_a_label(where: str, expr: str) -> None:
    known = COMMON | {"Location", "State", "Name", "GpuIndex"}
    for name in METRIC.findall(expr):
        known |= ours().get(name, ("", set()))[1]
    for labels in re.findall(r"\b(?:by|on) \((.*?)\)", expr):
        assert {label.strip() for label in labels.split(",")} <= known, where


@pytest.mark.parametrize(("where", "expr"), expressions())
def test_brackets_match(where: str, expr: str) -> None:
    depth: list[str] = []
    for sign in re.sub(r'".*?"', "", expr):
        if sign in "([{":
            depth.append(sign)
        elif sign in ")]}":
            assert depth.pop() + sign in {"()", "[]", "{}"}, where
    assert depth == []


@pytest.mark.parametrize(("where", "expr"), [(w, e) for w, e in expressions() if w.startswith("panel")])
def test_a_panel_shows_the_stages_apart(where: str, expr: str) -> None:
    if any("stage" in ours()[name][1] for name in METRIC.findall(expr) if name in ours()):
        assert re.search(r"by \([^)]*\bstage\b", expr), where


@pytest.mark.parametrize(("where", "expr"), expressions())
def test_actors_are_counted_once(where: str, expr: str) -> None:
    """Ray counts one in its controller (ALIVE), and one that lives in its own process too (ALIVE_IDLE)."""
    for selector in re.findall(r"ray_actors{(.*?)}", expr):
        assert "Source=" in selector or 'State="RESTARTING"' in selector, where


def test_every_alert_has_a_place_in_the_run_book() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/operations.md").read_text("utf-8"), re.M)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["run_book"] in headings


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_the_lines_of_the_run_book_are_ours() -> None:
    """Of every quoted line, the pieces between its values are in the code."""
    code = "".join(path.read_text("utf-8") for path in (ROOT / "vpo_ray").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    text = re.sub("```.*?```", "", (ROOT / "docs/operations.md").read_text("utf-8"), flags=re.S).replace(
        "\n", " "
    )
    lines = [line for line in re.findall(r"`([^`]+)`", text) if line.count(" ") > 3 and "vpo " not in line]
    assert len(lines) > 10
    for line in lines:
        for piece in re.split(r"[,;]|\.\.\.|\S*[\d:=]\S*|\b[A-Z]{1,4}\b", line):
            piece = piece.strip(" ,;").removeprefix("and ")
            assert piece.count(" ") < 2 or piece in code, f"{line!r}: {piece!r}"


def test_each_alert_fires_when_it_is_to_and_not_else(tmp_path: Path) -> None:
    cases = yaml.safe_load((ROOT / "tests/cluster/alerts_test.yaml").read_text("utf-8"))["tests"]
    tried = {
        case["alertname"] for test in cases for case in test["alert_rule_test"] if case.get("exp_alerts")
    }
    assert tried == {rule["alert"] for rule in RULES}
    if shutil.which("promtool") is None:
        pytest.skip("promtool of Debian's package prometheus evaluates the rules")
    for file in (GRAFANA / "alerts.yaml", ROOT / "tests/cluster/alerts_test.yaml"):
        shutil.copy(file, tmp_path)
    for words in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
