"""The flow `pipeline`: walks DVC's graph, one Prefect task a stage that must run.

DVC is the only cache: it says what is out of date, and Prefect's own caching stays off. What
Prefect adds is the record (states, logs, artifacts), the time limits and the parallel branches.

Import this after `flows.server.prefect_environment` is in `os.environ`.
"""

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.states import Cancelled, Completed, Failed

from flows import artifacts
from flows.graph import Graph, StageNode, order_lock
from flows.runner import STOP_GRACE_S, StageResult, run_stage
from flows.slots import Slots
from flows.terminal import Terminal

DRAIN_LIMIT_S = 60.0
STAGE_ENDING = {"cancelled": Cancelled, "failed": Failed, "timed out": Failed, "not run": Cancelled}


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
    after: Callable[[Path], list[str]] | None = None
    """Called once all stages stand (registers the model, say); its lines close the summary."""
    grace_s: float = STOP_GRACE_S
    """Seconds that a stopped stage has to save."""
    results: dict[str, StageResult] = dataclasses.field(default_factory=dict)
    """Filled by the flow."""
    closing: list[str] = dataclasses.field(default_factory=list)
    """What `after` said."""
    cancelled: bool = False
    """Whether somebody asked the run to stop."""

    def ordered_results(self) -> list[StageResult]:
        """Results in the order of the graph."""
        return [self.results[n.name] for n in self.graph.nodes if n.name in self.results]


def run_flow(run: Run) -> State:
    """Run the flow for `run` in this process; its final state. Fills `run.results`.

    All of its record has reached the server when this returns: it may be stopped.
    """
    wanted = run.graph.needed_for(run.stages)

    @flow(name="pipeline", persist_result=False, validate_parameters=False)
    async def pipeline(root: str, stages: list[str]) -> State:
        """Bring the pipeline up to date."""
        stop = asyncio.Event()
        with _stopped_by_signals(stop, run):
            await _walk(run, wanted, stop)
        order_lock(run.root, run.graph)
        if run.after and not stop.is_set() and all(r.good for r in run.results.values()):
            run.closing = await asyncio.to_thread(run.after, run.root)
        await artifacts.publish(run.root, run.graph, run.results)
        return _final_state(run)

    try:
        return asyncio.run(_call(pipeline, run))
    finally:
        # Task states travel as events, events and logs in the background.
        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(timeout=DRAIN_LIMIT_S, at_exit=False)


async def _call(pipeline: Any, run: Run) -> State:
    return await pipeline(root=run.root.name, stages=sorted(run.stages), return_state=True)


async def _walk(run: Run, wanted: frozenset[str], stop: asyncio.Event) -> None:
    """Run what is stale among `wanted`: each stage once all that it reads from is up to date."""
    slots = Slots(os.cpu_count() or 1)
    running: dict[str, asyncio.Task[State | None]] = {}
    for node in run.graph.nodes:
        if node.name not in wanted:
            continue
        if node.name not in run.graph.stale:
            run.results[node.name] = StageResult(name=node.name, state="up to date")
            continue
        before = [running[name] for name in node.upstream if name in running]
        running[node.name] = asyncio.create_task(_when_ready(run, node, before, slots, stop))
    await asyncio.gather(*running.values())


async def _when_ready(
    run: Run,
    node: StageNode,
    before: list[asyncio.Task[State | None]],
    slots: Slots,
    stop: asyncio.Event,
) -> State | None:
    """One stage: wait for those before it and for slots, then run it as a task."""
    states = [await earlier for earlier in before]
    if not all(run.results[name].good for name in node.upstream if name in run.results):
        run.results[node.name] = StageResult(name=node.name, state="not run")
        return None
    async with slots.take(node.slots):
        if stop.is_set():
            run.results[node.name] = StageResult(name=node.name, state="not run")
            return None
        return await _stage_task(run, node, stop)(
            wait_for=[state for state in states if state is not None], return_state=True
        )


def _stage_task(run: Run, node: StageNode, stop: asyncio.Event) -> Callable[..., Awaitable[State]]:
    @task(name=node.name, task_run_name=node.name, cache_policy=NO_CACHE, persist_result=False)
    async def stage() -> State:
        logger = get_run_logger()

        def show(line: str) -> None:
            logger.info(line)
            run.terminal.stage_line(node.name, line)

        run.terminal.started(node.name)
        result = await run_stage(
            run.root, node.name, timeout_s=node.timeout_s, stop=stop, on_line=show,
            grace_s=run.grace_s,
        )  # fmt: skip
        run.results[node.name] = result
        run.terminal.ended(result)
        ending = STAGE_ENDING.get(result.state, Completed)
        return ending(message=f"{result.state} in {result.seconds:.1f} s")

    return stage


@contextmanager
def _stopped_by_signals(stop: asyncio.Event, run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask once, kindly; a second one ends the flow at once."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def ask() -> None:
        for signum in signals:
            loop.remove_signal_handler(signum)
        run.cancelled = True
        run.terminal.say("stopping: stages save what they need (once more to stop at once)")
        stop.set()

    for signum in signals:
        loop.add_signal_handler(signum, ask)
    try:
        yield
    finally:
        for signum in signals:
            loop.remove_signal_handler(signum)


def _final_state(run: Run) -> State:
    counts: dict[str, int] = {}
    for result in run.results.values():
        counts[result.state] = counts.get(result.state, 0) + 1
    message = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    if run.cancelled:
        return Cancelled(message=message)
    if all(result.good for result in run.results.values()):
        return Completed(message=message)
    return Failed(message=message)
