"""One run of the pipeline from the command line's options: workspace, lock, server, flow."""

import contextlib
import os
import time
from pathlib import Path

from flows.graph import Graph, load_graph
from flows.lock import run_lock
from flows.runner import StageResult
from flows.server import Server, prefect_environment, server
from flows.terminal import Terminal, summary_table
from flows.workspace import Variation
from flows.workspace import workspace as prepared
from infra.errors import UserError
from infra.stage import START_FOLDER

EXIT_FAILED = 1
EXIT_CANCELLED = 130
REPORT_DATA = Path("artifacts/report/report.json")
REPORT_PAGE = Path("work/report/index.html")
TAIL_SHOWN = 15


def run_pipeline(
    root: Path,
    *,
    stages: tuple[str, ...] = (),
    variation: Variation | None = None,
    workspace: Path | None = None,
    terminal: Terminal | None = None,
) -> int:
    """Run what changed; the exit status: 0, 1 (a stage failed) or 130 (stopped).

    Raises UserError for an unknown stage, profile or parameter, and if a run is already going on
    in the same workspace.
    """
    terminal = terminal or Terminal()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if workspace or variation:
            variation = variation or Variation()
            lock = stack.enter_context(prepared(root, variation, workspace, terminal.say))
            terminal.say(f"workspace: {lock.root}")
        else:
            lock = stack.enter_context(run_lock(root, terminal.say))
        root = lock.root
        os.environ.update(prefect_environment(root))
        # The server starts while DVC reads the graph and Prefect is imported.
        own = None if "PREFECT_API_URL" in os.environ else stack.enter_context(server(root))
        graph = load_graph(root)
        needed = graph.needed_for(stages) & graph.stale
        terminal.say(f"{len(needed)} of {len(graph.nodes)} stages to run")
        return _run(root, graph, stages, own, terminal, began)


def _run(
    root: Path,
    graph: Graph,
    stages: tuple[str, ...],
    own: Server | None,
    terminal: Terminal,
    began: float,
) -> int:
    if own:  # Prefect reads its settings when it is imported
        os.environ["PREFECT_API_URL"] = own.url
    try:
        from flows.pipeline import Run, run_flow

        run = Run(root=root, graph=graph, stages=stages, terminal=terminal, after=finish)
        if own:
            own.wait()
        run_flow(run)
    finally:
        if own:
            del os.environ["PREFECT_API_URL"]
    results = run.ordered_results()
    terminal.say()
    for result in results:
        _explain(result, terminal)
    terminal.say(summary_table(results, began))
    for line in run.closing:
        terminal.say(line)
    if (root / REPORT_PAGE).is_file():
        terminal.say(f"report: {root / REPORT_PAGE}")
    if run.cancelled:
        terminal.say("stopped; run `make run` again to go on: finished stages are kept")
        return EXIT_CANCELLED
    return 0 if all(result.good for result in results) else EXIT_FAILED


def finish(root: Path) -> list[str]:
    """What is left to do once all stages stand: register what the gate passed, render the page.

    Returns lines for people. Costs nothing when there is nothing new.
    """
    from infra.registry import register_passed

    lines: list[str] = []
    try:
        passed = register_passed(root)
    except UserError as error:
        lines.append(f"the model was NOT registered: {error}")
    else:
        if passed:
            version, unseen = passed
            lines.append(f"champion: {version.ref} (`vlfoundry models` lists all)")
            if unseen:
                lines.append(
                    f"NOTE: the gate did not compare it with {unseen.ref}, which it replaces; "
                    f"`vlfoundry import {unseen.ref} {START_FOLDER}/{unseen.ref} --profile NAME` "
                    "makes a profile whose runs are compared with it"
                )
    if (root / REPORT_DATA).is_file() and not (root / REPORT_PAGE).is_file():
        from eval.report.page import render

        render(root, root / REPORT_PAGE)
    return lines


def _explain(result: StageResult, terminal: Terminal) -> None:
    if result.state not in ("failed", "timed out"):
        return
    terminal.say(f"{result.name} {result.state}; its last lines:")
    for line in result.tail[-TAIL_SHOWN:]:
        terminal.say(f"    {line}")
