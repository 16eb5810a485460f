"""The flow `pipeline`: Prefect's record of a walk over DVC's graph, one task a stage that runs.

What Prefect adds is the record: states, logs, artifacts. It is kept by a thread of its own, which
only listens: a server that dies, hangs or never answers costs the record and one line, and the
stages, the table and the exit code are what they would have been. Prefect's own caching stays off.

Who types `vlfoundry run` gets a flow run that this thread begins and ends. In a run of a deployment
(`flows/deployed.py`) Prefect has begun one already: there the thread adds the stages to it.

Import this after `flows.server.prefect_environment` is in `os.environ`.
"""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import gto.log  # noqa: F401 - sets logging up, for which Prefect's threads must not wait
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.states import Cancelled, Completed, Failed

from vlfoundry.flows import artifacts
from vlfoundry.flows.graph import StageNode
from vlfoundry.flows.runner import StageResult
from vlfoundry.flows.server import answers
from vlfoundry.flows.walk import Run, walk

FLOW = "pipeline"
"""its name on the server, whoever starts it"""
RECORD_LIMIT_S = 60.0
"""How long the record may take after the last stage while its server answers."""
ANSWER_LIMIT_S = 3.0
POLL_S = 0.2
STAGE_ENDING = {"cancelled": Cancelled, "failed": Failed, "timed out": Failed, "not run": Cancelled}


def run_flow(
    run: Run, url: str | None = None, lives: Callable[[], str | None] = lambda: None
) -> State | None:
    """Walk the graph in this process and let Prefect record it. Fills `run.results`.

    All of the record has reached the server when this returns a state: the server may be stopped.

    Args:
        run: what to run.
        url: of Prefect's API; None: the one of the environment.
        lives: why the server cannot live any more; None while it can.

    Returns:
        The flow's final state; None if the record is incomplete, which the terminal has said.
    """
    return _kept(run, Record(run), url, lives)


def run_in_flow(run: Run, url: str | None) -> State:
    """The same inside of a flow run of Prefect's; the state that it should end in.

    Whatever becomes of the record, the state says what became of the run.
    """
    _kept(run, Record(run, inside=True), url, lambda: None)
    return final_state(run)


def _kept(
    run: Run, record: "Record", url: str | None, lives: Callable[[], str | None]
) -> State | None:
    asyncio.run(_watched(run, record, lives))
    return record.close(url, lives)


async def _watched(run: Run, record: "Record", lives: Callable[[], str | None]) -> None:
    """The walk, and a look at the server once a second until that is gone."""
    walking = asyncio.create_task(walk(run, record))
    while not walking.done():
        await asyncio.wait({walking}, timeout=1.0)
        if why := lives():
            record.lose(why)
            break
    await walking


class Record:
    """Tells Prefect what happens, from a thread of its own. A `flows.walk.Watcher`.

    Args:
        run: what is walked.
        inside: whether it is made in a flow run, which it adds to; else it makes one.
    """

    def __init__(self, run: Run, *, inside: bool = False) -> None:
        _quieten()
        self._run = run
        wanted = run.graph.needed_for(run.stages) & run.graph.stale
        self._nodes = [node for node in run.graph.nodes if node.name in wanted]
        self._loop = asyncio.new_event_loop()
        self._said: dict[str, asyncio.Queue[str | StageResult | None]] = {
            node.name: asyncio.Queue() for node in self._nodes
        }
        self._over = asyncio.Event()
        self.lost = False
        threading.Thread(target=self._loop.run_forever, daemon=True, name="record").start()
        # What is scheduled here has our context, and with it the flow run that we may be in.
        keep = self._listen() if inside else self._keep()
        self._ending = asyncio.run_coroutine_threadsafe(keep, self._loop)

    def started(self, name: str) -> None:
        """A stage begins."""
        self._tell(name, None)

    def line(self, name: str, line: str) -> None:
        """A stage has printed a line."""
        self._tell(name, line)

    def ended(self, result: StageResult) -> None:
        """A stage has ended, or will not run at all."""
        self._tell(result.name, result)

    def lose(self, why: str) -> None:
        """Give the record up, and say so once."""
        if not self.lost:
            self.lost = True
            self._run.terminal.tell(f"Prefect's record of this run is incomplete: {why}")

    def close(self, url: str | None, lives: Callable[[], str | None]) -> State | None:
        """Wait until the record is complete, or cannot be any more; the flow's final state."""
        self._loop.call_soon_threadsafe(self._over.set)
        deadline = time.monotonic() + RECORD_LIMIT_S
        while not self.lost:
            concurrent.futures.wait([self._ending], POLL_S)
            if self._ending.done():
                return self._ending.result() if self._ending.exception() is None else self._failed()
            if why := lives() or _unheard(url, deadline):
                self.lose(why)
        return None

    def _failed(self) -> None:
        error = self._ending.exception()
        text = str(error).strip().partition("\n")[0]
        self.lose(f"{type(error).__name__}{f': {text}' if text else ''}")

    def _tell(self, name: str, what: str | StageResult | None) -> None:
        self._loop.call_soon_threadsafe(self._said[name].put_nowait, what)

    async def _keep(self) -> State:
        """The flow, until all of it has reached the server."""

        @flow(name=FLOW, persist_result=False, validate_parameters=False)
        async def pipeline(project: str, stages: list[str]) -> State:
            """Bring the pipeline up to date."""
            return await self._listen()

        record: Any = pipeline  # its overloads do not know `return_state`
        state = await record(
            project=self._run.root.name, stages=sorted(self._run.stages), return_state=True
        )
        # Task states travel as events, events and logs in the background.
        for worker in (EventsWorker, APILogWorker):
            draining: Any = worker.drain_all(timeout=RECORD_LIMIT_S, at_exit=False)
            await draining
        return state

    async def _listen(self) -> State:
        """One task a stage, until the run is over; the state that the flow should end in."""
        following: dict[str, asyncio.Task[State | None]] = {}
        for node in self._nodes:
            before = [following[name] for name in node.upstream if name in following]
            following[node.name] = asyncio.create_task(self._follow(node, before))
        await asyncio.gather(*following.values())
        await self._over.wait()
        await artifacts.publish(self._run.root, self._run.graph, self._run.results)
        return final_state(self._run)

    async def _follow(
        self, node: StageNode, before: list[asyncio.Task[State | None]]
    ) -> State | None:
        """One stage as a task, which begins when the stage begins."""
        states = [await earlier for earlier in before]
        said = self._said[node.name]
        if await said.get() is not None:
            return None  # it was not run
        return await _stage_task(node.name, said)(
            wait_for=[state for state in states if state is not None], return_state=True
        )


def _stage_task(
    name: str, said: "asyncio.Queue[str | StageResult | None]"
) -> Callable[..., Awaitable[State]]:
    @task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    async def stage() -> State:
        logger = get_run_logger()
        while not isinstance(what := await said.get(), StageResult):
            logger.info(what)
        ending = STAGE_ENDING.get(what.state, Completed)
        return ending(message=f"{what.state} in {what.seconds:.1f} s")

    return stage


def _quieten() -> None:
    """Prefect's workers tell the terminal, past its settings, what they cannot send."""
    logging.raiseExceptions = False
    for worker in (EventsWorker, APILogWorker):
        logging.getLogger(worker.__name__).setLevel(logging.CRITICAL)


def _unheard(url: str | None, deadline: float) -> str | None:
    """Why there is no point in waiting for the server; None: there is."""
    if url and not answers(url, ANSWER_LIMIT_S):
        return f"Prefect's server at {url} does not answer"
    if time.monotonic() > deadline:
        return f"Prefect's server took more than {RECORD_LIMIT_S:.0f} s to store it"
    return None


def final_state(run: Run) -> State:
    """How the run ended, as Prefect has it."""
    counts: dict[str, int] = {}
    for result in run.results.values():
        counts[result.state] = counts.get(result.state, 0) + 1
    message = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    if run.cancelled:
        return Cancelled(message=message)
    if run.closing.failed or not all(result.good for result in run.results.values()):
        return Failed(message=_with_closing(message, run))
    # Of type Completed, for nothing is to be tried again; the name is what automations look at.
    name = {"promoted": "Promoted", "rejected": "Rejected"}.get(run.closing.verdict or "")
    return Completed(name=name or "Completed", message=_with_closing(message, run))


def _with_closing(message: str, run: Run) -> str:
    return "; ".join([message, *(line.strip() for line in run.closing.lines)])
