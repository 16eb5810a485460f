"""Walks DVC's graph: each stage that must run, once all that it reads from is up to date.

DVC is the only cache: it says what is out of date. Whoever keeps a record of the walk
(`flows/pipeline.py`) watches it and can neither delay nor stop it.
"""

import asyncio
import dataclasses
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from vlfoundry.flows import runcache
from vlfoundry.flows.graph import DEFAULT_TIMEOUT_S, Graph, StageNode, order_lock
from vlfoundry.flows.restored import drop_damaged
from vlfoundry.flows.runner import STOP_GRACE_S, StageResult, run_guarded, run_stage
from vlfoundry.flows.slots import Slots
from vlfoundry.flows.terminal import Terminal
from vlfoundry.infra.core.interrupts import EXIT_INTERRUPTED


class Watcher(Protocol):
    """Is told what happens. Must return at once and must not raise."""

    def started(self, name: str) -> None:
        """A stage begins."""

    def line(self, name: str, line: str) -> None:
        """A stage has printed a line."""

    def ended(self, result: StageResult) -> None:
        """A stage has ended, or will not run at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Closing:
    """What became of the run as a whole, once all stages stand."""

    lines: tuple[str, ...] = ()
    """For people."""
    verdict: Literal["promoted", "rejected"] | None = None
    """The gate's, if the run has one."""
    failed: bool = False
    """Whether what the gate passed could not be registered."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """One walk over the graph: what it was asked, and what came of it."""

    root: Path
    """The workspace."""
    graph: Graph
    """As DVC sees it at the start."""
    stages: tuple[str, ...] = ()
    """Only these and what they need; all if empty."""
    terminal: Terminal = dataclasses.field(default_factory=Terminal)
    """Where people look."""
    after: Callable[[Path], Closing] | None = None
    """Called once all stages stand (registers the model, say); its lines close the summary."""
    held: tuple[int, ...] = ()
    """File descriptors that the processes of its stages keep open: the lock of the run."""
    grace_s: float = STOP_GRACE_S
    """Seconds that a stopped stage has to save."""
    results: dict[str, StageResult] = dataclasses.field(default_factory=dict)
    """Filled by the flow."""
    closing: Closing = dataclasses.field(default_factory=lambda: Closing())
    """What `after` said."""
    cancelled: bool = False
    """Whether somebody asked the run to stop."""

    def ordered_results(self) -> list[StageResult]:
        """Results in the order of the graph."""
        return [self.results[n.name] for n in self.graph.nodes if n.name in self.results]


async def restore(run: Run) -> None:
    """Restore all stages that DVC's cache knows, in one process; `walk` does what is left.

    Fills `run.results` with what it restored, and `run.cancelled`.
    """
    wanted = run.graph.needed_for(run.stages) & run.graph.stale
    if wanted.isdisjoint(run.graph.restorable):
        return
    nodes = [node for node in run.graph.nodes if node.name in wanted]
    command = runcache.command_line([n.name, *wanted.intersection(n.upstream)] for n in nodes)
    others: deque[str] = deque(maxlen=1)
    stop = asyncio.Event()
    with _stopped_by_signals(stop, run):
        code, ending = await run_guarded(
            command, run.root, timeout_s=DEFAULT_TIMEOUT_S, stop=stop,
            on_line=lambda line: _note(run, line, others), grace_s=run.grace_s, held=run.held,
        )  # fmt: skip
    if code and not ending:
        why = " ".join(others) or f"exit status {code}"
        run.terminal.say(f"DVC's cache is asked for each stage by itself now: {why}")


def _note(run: Run, line: str, others: deque[str]) -> None:
    """Take a line of the restoring process; it goes to `others` if it tells of no stage."""
    restored = runcache.read_line(line)
    if restored is None:
        others.append(line)
    elif restored.state == "damaged":
        run.terminal.stage_line(restored.stage, _damaged(restored.damaged))
    else:
        run.results[restored.stage] = StageResult(
            name=restored.stage, state=restored.state, seconds=restored.seconds, code=0
        )
        run.terminal.ended(run.results[restored.stage])


async def walk(run: Run, watcher: Watcher | None = None) -> None:
    """Run what is stale. Fills `run.results`, `run.closing` and `run.cancelled`."""
    stop = asyncio.Event()
    if run.cancelled:
        stop.set()
    if watcher:
        for result in run.results.values():
            watcher.started(result.name)
            watcher.ended(result)
    with _stopped_by_signals(stop, run):
        await _walk(run, stop, watcher)
    order_lock(run.root, run.graph)
    if run.after and not stop.is_set() and all(r.good for r in run.results.values()):
        run.closing = await asyncio.to_thread(run.after, run.root)


async def _walk(run: Run, stop: asyncio.Event, watcher: Watcher | None) -> None:
    slots, wanted = Slots(os.cpu_count() or 1), run.graph.needed_for(run.stages)
    running: dict[str, asyncio.Task[None]] = {}
    for node in run.graph.nodes:
        if node.name not in wanted or node.name in run.results:
            continue
        if node.name not in run.graph.stale:
            run.results[node.name] = StageResult(name=node.name, state="up to date")
            continue
        before = [running[name] for name in node.upstream if name in running]
        running[node.name] = asyncio.create_task(
            _when_ready(run, node, before, slots, stop, watcher)
        )
    await asyncio.gather(*running.values())


async def _when_ready(
    run: Run,
    node: StageNode,
    before: list[asyncio.Task[None]],
    slots: Slots,
    stop: asyncio.Event,
    watcher: Watcher | None,
) -> None:
    """One stage: wait for those before it and for slots, then run it."""
    for earlier in before:
        await earlier
    if all(run.results[name].good for name in node.upstream if name in run.results):
        async with slots.take(node.slots):
            if not stop.is_set():
                await _run_stage(run, node, stop, watcher)
    result = run.results.setdefault(node.name, StageResult(name=node.name, state="not run"))
    if watcher:
        watcher.ended(result)


async def _run_stage(
    run: Run, node: StageNode, stop: asyncio.Event, watcher: Watcher | None
) -> None:
    def show(line: str) -> None:
        if stop.is_set() and line.startswith("ERROR: failed to reproduce"):
            return  # it is not DVC's stage that failed
        run.terminal.stage_line(node.name, line)
        if watcher:
            watcher.line(node.name, line)

    run.terminal.started(node.name)
    if watcher:
        watcher.started(node.name)

    async def attempt() -> StageResult:
        return await run_stage(
            run.root, node.name, timeout_s=node.timeout_s, stop=stop, on_line=show,
            grace_s=run.grace_s, held=run.held,
        )  # fmt: skip

    result = await attempt()
    if result.state == "restored":
        damaged = await asyncio.to_thread(drop_damaged, run.root, node.name)
        if damaged:
            show(_damaged(damaged))
            result = await attempt()
    run.results[node.name] = result
    run.terminal.ended(result)


def _damaged(paths: Iterable[str]) -> str:
    """What is said of outputs that DVC's cache gave back damaged."""
    return f"damaged in DVC's cache and deleted there: {', '.join(paths)}; it runs again"


@contextmanager
def _stopped_by_signals(stop: asyncio.Event, run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask once, kindly; a second one ends the flow at once."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def ask() -> None:
        if stop.is_set():
            run.terminal.tell("stopped at once; the next run goes on where the stages last saved")
            os._exit(EXIT_INTERRUPTED)  # the guards of the stages see it, as after a kill
        run.cancelled = True
        run.terminal.tell("stopping: stages save what they need (once more to stop at once)")
        stop.set()

    for signum in signals:
        loop.add_signal_handler(signum, ask)
    try:
        yield
    finally:
        for signum in signals:
            loop.remove_signal_handler(signum)
