"""What a flow run shows in Prefect: the graph, the data funnel, the scores, where the report is.

The texts are made by plain functions from the files of the run; only `publish` knows Prefect.
"""

import json
import platform
from pathlib import Path
from typing import Any

from vlfoundry.flows.graph import Graph
from vlfoundry.flows.runner import StageResult

REPORT_PAGE = "work/report/index.html"
COLOURS = {
    "ran": "#c6e9c6",
    "restored": "#d7e8f7",
    "unchanged": "#e8eef2",
    "up to date": "#e8eef2",
    "failed": "#f6c7c3",
    "timed out": "#f6c7c3",
    "cancelled": "#fbe3b5",
    "not run": "#ffffff",
}
DARK = "#1c2733"


async def publish(root: Path, graph: Graph, results: dict[str, StageResult]) -> None:
    """Write the artifacts of a flow run; those whose files are not there yet are left out."""
    from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact

    await acreate_markdown_artifact(
        key="graph", markdown=graph_markdown(graph, results), description="Stages of this run"
    )
    if funnel := funnel_rows(root):
        await acreate_table_artifact(key="funnel", table=funnel, description="The data funnel")
    if scores := score_rows(root):
        await acreate_table_artifact(key="scores", table=scores, description="Scores")
    if (root / REPORT_PAGE).is_file():
        await acreate_markdown_artifact(
            key="report", markdown=report_markdown(root), description="Where the report is"
        )


def report_markdown(root: Path) -> str:
    """Where the page is. No link: a browser opens no file from a page that came over HTTP, and on
    another machine the path is nobody's."""
    return (
        f"The report is one page that works offline, `{REPORT_PAGE}` of the workspace "
        f"`{root.name}` on `{platform.node()}`. `vlfoundry report --out FILE` draws it again."
    )


def graph_markdown(graph: Graph, results: dict[str, StageResult]) -> str:
    """The graph as a Mermaid diagram, coloured by how each stage ended, and a table."""
    number = {node.name: f"s{index}" for index, node in enumerate(graph.nodes)}
    diagram = ["```mermaid", "flowchart TD"]
    for node in graph.nodes:
        diagram.append(f'  {number[node.name]}["{node.name}"]')
        diagram += [f"  {number[name]} --> {number[node.name]}" for name in node.upstream]
    used: dict[str, list[str]] = {}
    for name, result in results.items():
        used.setdefault(result.state, []).append(number[name])
    for state, members in sorted(used.items()):
        label = state.replace(" ", "_")
        diagram.append(f"  classDef {label} fill:{COLOURS[state]},stroke:{DARK},color:{DARK}")
        diagram.append(f"  class {','.join(members)} {label}")
    table = ["", "| stage | state | seconds |", "|---|---|---:|"]
    for node in graph.nodes:
        if result := results.get(node.name):
            table.append(f"| {node.name} | {result.state} | {result.seconds:.1f} |")
    return "\n".join([*diagram, "```", *table])


def funnel_rows(root: Path) -> list[dict[str, Any]]:
    """One row for each number that the data stages report: stage, measure, value."""
    rows = []
    for stage in ("ingest", "bootstrap", "filter", "dedup", "decontaminate", "shard"):
        path = root / "artifacts" / stage / "metrics.json"
        if path.is_file():
            for name, value in _flat(json.loads(path.read_text("utf-8"))).items():
                rows.append({"stage": stage, "measure": name, "value": value})
    return rows


def score_rows(root: Path) -> list[dict[str, Any]]:
    """One row for each score of each evaluated model."""
    rows = []
    for path in sorted((root / "artifacts" / "evaluate").glob("*/scores.json")):
        for score in json.loads(path.read_text("utf-8"))["scores"]:
            shown = (
                "suite", "name", "lang", "value", "stderr", "n", "chance", "untrained", "baseline",
            )  # fmt: skip
            rows.append({"model": path.parent.name} | {key: score.get(key) for key in shown})
    return rows


def _flat(value: Any, prefix: str = "") -> dict[str, float | int | str]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists are left out."""
    if isinstance(value, dict):
        flat: dict[str, float | int | str] = {}
        for key, inner in value.items():
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value} if isinstance(value, int | float | str) else {}
