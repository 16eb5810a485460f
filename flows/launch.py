"""One run of the pipeline from the command line's options: workspace, lock, server, flow."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vlfoundry.flows.addresses import check_stages
from vlfoundry.flows.database import check_database
from vlfoundry.flows.dvclocks import clear_stale
from vlfoundry.flows.graph import load_graph
from vlfoundry.flows.inputs import check_inputs
from vlfoundry.flows.kept import kept
from vlfoundry.flows.leftovers import clear_part_files
from vlfoundry.flows.lock import RunLock, run_lock
from vlfoundry.flows.parameters import check_parameters
from vlfoundry.flows.restored import drop_damaged
from vlfoundry.flows.runner import StageResult
from vlfoundry.flows.server import Server, ServerError, prefect_environment, server
from vlfoundry.flows.terminal import DVC_NOISE, Terminal, summary_table
from vlfoundry.flows.verbosity import Verbosity
from vlfoundry.flows.walk import Closing, Run, restore, walk
from vlfoundry.flows.workspace import Variation
from vlfoundry.flows.workspace import workspace as prepared
from vlfoundry.infra.core.config import parse_value
from vlfoundry.infra.core.dvccache import cache_folder
from vlfoundry.infra.core.errors import UserError, ending, killed_by
from vlfoundry.infra.core.space import free_bytes, no_space, require_space, said
from vlfoundry.infra.core.stage import START_FOLDER
from vlfoundry.infra.registry.gto import GATE_DECISION

EXIT_FAILED = 1
EXIT_REJECTED = 3
"""all stages stand, and the gate said no"""
EXIT_CANCELLED = 130
EXTERNAL = "PREFECT_API_URL"
GATE = "gate"
"""the stage whose verdict is the run's"""
REPORT = "report"
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
    """Run what changed; the exit status: 0, 1 (a stage failed), 3 (the gate said no) or 130
    (stopped).

    Raises UserError for an unknown stage, profile or parameter, and if a run is already going on
    in the same workspace.
    """
    terminal = terminal or Terminal()
    began = time.monotonic()
    check_stages(root, stages)
    if stages and (workspace or variation):  # before a place is made for the run
        load_graph(root, lambda _: None, beside=True).needed_for(stages)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(root, variation, workspace, terminal))
        os.environ.update(prefect_environment(lock.root))
        if terminal.verbosity is Verbosity.VERBOSE:
            os.environ.update(PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="DEBUG")
        if not _external(root):
            # The server starts while DVC reads the graph.
            own = _own_server(lock.root, lock, stack, terminal)
        else:
            own = None
        run = _asked(lock, stages, terminal)
        complete = _walk(run, own)
        code = _close(run, began)
    if not complete:
        _leave(code)
    return code


def run_deployed(
    root: Path,
    record: Callable[[Run], None],
    *,
    stages: tuple[str, ...],
    variation: Variation | None,
    terminal: Terminal,
    wait: bool,
) -> Run:
    """The same run inside of a flow run of Prefect's, which `record` walks.

    wait: for another run in the same workspace, however long that takes.

    Raises UserError as `run_pipeline` does; BusyError only without `wait`.
    """
    began = time.monotonic()
    if stages and variation:
        load_graph(root, lambda _: None, beside=True).needed_for(stages)
    with _locked(root, variation, None, terminal, wait=wait) as lock:
        run = _asked(lock, stages, terminal)
        record(run)
        _close(run, began)
    return run


@contextlib.contextmanager
def _locked(
    root: Path,
    variation: Variation | None,
    workspace: Path | None,
    terminal: Terminal,
    *,
    wait: bool = False,
) -> Iterator[RunLock]:
    """The workspace of the run, ready for it, and nobody else's."""
    with contextlib.ExitStack() as stack:
        if workspace or variation:
            variation = variation or Variation()
            made = prepared(root, variation, workspace, terminal.say, wait=wait)
            lock = stack.enter_context(made)
            terminal.say(f"workspace: {lock.root}")
        else:
            lock = stack.enter_context(run_lock(root, terminal.say, wait=wait))
        check_parameters(lock.root)
        clear_part_files(cache_folder(lock.root))
        require_space(*_written(lock.root))
        yield lock


def _asked(lock: RunLock, stages: tuple[str, ...], terminal: Terminal) -> Run:
    """What is to be run, as DVC sees it now; what its cache knows of that is restored already."""
    root = lock.root
    clear_stale(root)
    graph = load_graph(root, terminal.say)
    needed = graph.needed_for(stages) & graph.stale
    check_inputs(root, graph, needed)
    terminal.say(f"{len(needed)} of {len(graph.nodes)} stages to run")
    judged = GATE in graph.needed_for(stages)
    run = Run(
        root=root, graph=graph, stages=stages, terminal=terminal, held=(lock.descriptor,),
        after=functools.partial(finish, judged=judged),
    )  # fmt: skip
    asyncio.run(restore(run))
    return run


def _external(root: Path) -> bool:
    """Whether Prefect is told of a server that is not this run's own; finds the project's."""
    if not os.environ.get(EXTERNAL) and (found := kept(root)):
        os.environ.update(found.environment)
    return bool(os.environ.get(EXTERNAL))  # an empty one is none, for Prefect too


def _own_server(
    root: Path, lock: RunLock, stack: contextlib.ExitStack, terminal: Terminal
) -> Server | None:
    """Start a server for this run; None, which is said, if there is no place for its record."""
    try:
        check_database(root / "work" / "prefect", terminal.tell)
        return stack.enter_context(server(root, held=(lock.descriptor,)))
    except OSError as error:
        if full := no_space(error, root / "work"):
            raise full from error
        terminal.tell(f"no record of this run is kept: work/prefect cannot be used ({error})")
        return None


def _walk(run: Run, own: Server | None) -> bool:
    """Run the stages; whether nothing of Prefect is left that could hold us up at the end."""
    url = own.url if own else os.environ.get(EXTERNAL)
    if not url or (own and not _answering(run, own)):
        asyncio.run(walk(run))
        return True
    os.environ[EXTERNAL] = url  # Prefect reads its settings when it is imported
    try:
        from vlfoundry.flows.pipeline import run_flow

        def lives() -> str | None:
            return f"its server {own.ending}" if own and not own.lives else None

        return run_flow(run, url, lives) is not None
    finally:
        if own:
            del os.environ[EXTERNAL]


def _answering(run: Run, own: Server) -> bool:
    """Wait for the server; False, which is said, if it does not start."""
    try:
        own.wait()
    except ServerError as error:
        if full := no_space(RuntimeError(str(error)), run.root / "work", ask_disks=True):
            raise full from error
        run.terminal.tell(f"no record of this run is kept: {error}")
        return False
    return True


def _leave(code: int) -> NoReturn:
    """End this process without Prefect's workers, who would go on trying to reach the server."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _close(run: Run, began: float) -> int:
    """Say how everything ended; the exit status."""
    root, terminal = run.root, run.terminal
    results = run.ordered_results()
    terminal.say()
    for result in results:
        _explain(result, root, terminal)
    terminal.say(summary_table(results, began))
    if any(r.name == REPORT and r.good for r in results) and (root / REPORT_PAGE).is_file():
        terminal.say(f"report: {root / REPORT_PAGE}")
    for line in run.closing.lines:
        terminal.tell(line)
    if run.cancelled:
        terminal.tell("stopped; run the same command again to go on: finished stages are kept")
        return EXIT_CANCELLED
    if run.closing.failed or not all(result.good for result in results):
        return EXIT_FAILED
    return EXIT_REJECTED if run.closing.verdict == "rejected" else 0


def finish(root: Path, *, judged: bool = True) -> Closing:
    """What is left to do once all stages stand: register what the gate passed, render the page.

    judged: whether the gate is one of the stages that were asked for. Costs nothing when there is
    nothing new.
    """
    if (root / REPORT_DATA).is_file() and not (root / REPORT_PAGE).is_file():
        from vlfoundry.eval.report.page import render

        render(root, root / REPORT_PAGE)
    decision = root / GATE_DECISION
    if not judged or not decision.is_file():
        return Closing()
    gate = json.loads(decision.read_text("utf-8"))
    closing = _promote(root, gate["model"]) if gate["passed"] else _rejection(gate)
    return dataclasses.replace(closing, lines=(*gate.get("warnings", ()), *closing.lines))


def _rejection(gate: Mapping[str, Any]) -> Closing:
    failed, checks = gate["reasons"], len(gate["checks"])
    lines = [f"gate: {gate['candidate']} was NOT promoted; {len(failed)} of {checks} checks failed"]
    return Closing(lines=(*lines, *(f"    {reason}" for reason in failed)), verdict="rejected")


def _promote(root: Path, model: str) -> Closing:
    from vlfoundry.infra.registry.gto import register_passed

    try:
        passed = register_passed(root)
    except UserError as error:
        damaged = _drop_damaged_maker(root, model)
        advice = f"; deleted as damaged: {', '.join(damaged)}: run again" if damaged else ""
        lines = (f"the model passed the gate and was NOT registered: {error}{advice}",)
        return Closing(lines=lines, failed=True)
    assert passed
    version, unseen = passed
    lines = [f"gate: promoted; champion: {version.ref} (`vlfoundry models` lists all)"]
    if unseen:
        lines.append(
            f"NOTE: the gate did not compare it with {unseen.ref}, which it replaces; "
            f"`vlfoundry import {unseen.ref} {START_FOLDER}/{unseen.ref} --profile NAME` "
            "makes a profile whose runs are compared with it"
        )
    return Closing(lines=tuple(lines), verdict="promoted")


def _drop_damaged_maker(root: Path, model: str) -> list[str]:
    """Delete what is damaged of the stage that made a model, so that the next run makes it."""
    stages = (parse_value((root / "dvc.lock").read_text("utf-8")) or {}).get("stages", {})
    makers = [n for n, s in stages.items() if any(o["path"] == model for o in s.get("outs", []))]
    return [path for name in makers for path in drop_damaged(root, name)]


def _written(root: Path) -> tuple[Path, ...]:
    """The folders whose disks must not be full."""
    return root / "work", root / "artifacts", cache_folder(root)


def _explain(result: StageResult, root: Path, terminal: Terminal) -> None:
    if result.state not in ("failed", "timed out"):
        return
    killed = ""
    if result.state == "failed" and result.code and killed_by(result.code):
        killed = f" ({ending(result.code)})"
    terminal.tell(f"{result.name} {result.state}{killed}; its last lines:")
    for line in [line for line in result.tail if not DVC_NOISE.match(line)][-TAIL_SHOWN:]:
        terminal.tell(f"    {line}")
    if any(no_space(RuntimeError(line)) for line in result.tail):  # DVC's words, or the stage's
        fullest = min(_written(root), key=free_bytes)
        terminal.tell(f"{result.name}: {said(fullest)}")
        clear_part_files(cache_folder(root))
