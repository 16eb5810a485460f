"""Runs what is deployed: Prefect's worker for processes, which leaves none behind."""

import asyncio
import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vlfoundry.flows.deploy import check_name, pool_of
from vlfoundry.flows.flowrun import WORKER
from vlfoundry.flows.kept import connect
from vlfoundry.flows.marks import mark
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.guard import descendants, parent_of, send

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.workers.process import ProcessWorker

POLL_S = 0.2
RECONCILE_S = 30.0
STOP_GRACE_S = 30.0
"""What a run has to end: its stages need 12.5 s, and it tells the server."""

LAST_WORDS_S = 10.0
STUCK_S = 20
"""An event loop that has not turned for so long never will."""


def work(root: Path, pool: str | None, say: Callable[[str], None]) -> None:
    """Run what is deployed for the project `root` until this process is asked to end.

    Args:
        root: the project.
        pool: Prefect's work pool; None: named after the project.
        say: is told what happens.

    Raises:
        UserError: the pool's name cannot be, there is no server, or another worker serves the
            project from this pool.
    """
    check_name("--pool", pool)
    pool = pool or pool_of(root)
    with mark(root / f"work/prefect/worker-{pool}.lock", "the lock of the worker") as descriptor:
        if descriptor is None:
            raise UserError(f"another worker serves {root} from the pool {pool!r}; stop it first")
        url = connect(root)
        # The programs of this environment come first, whatever the shell has.
        programs = str(Path(sys.prefix) / "bin")
        os.environ["PATH"] = programs + os.pathsep + os.environ.get("PATH", "")
        os.environ[WORKER] = str(os.getpid())
        from vlfoundry.flows.pool import ensure_pool

        ensure_pool(pool)
        say(f"worker of the pool {pool} on {url}; Ctrl-C ends it")
        with Pulse(say) as pulse:
            asyncio.run(_work(root, pool, say, pulse))


async def _work(root: Path, pool: str, say: Callable[[str], None], pulse: "Pulse") -> None:
    from prefect.workers.process import ProcessWorker

    beating = asyncio.create_task(pulse.beat())
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, asked.set)
    worker = ProcessWorker(work_pool_name=pool, create_pool_if_not_found=False)
    worker.run = _telling(worker, say)
    working = asyncio.create_task(worker.start(printer=lambda *_: None))
    tidying = asyncio.create_task(_reconcile(root, pool, say))
    stopping = asyncio.create_task(asked.wait())
    await asyncio.wait({working, tidying, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if asked.is_set():
        say("stopping: runs save what they need")
        pulse.code = 0
        await asyncio.to_thread(_end_runs)
    for task in (tidying, stopping, working):
        task.cancel()
    ended, hung = await asyncio.wait({working, tidying}, timeout=LAST_WORDS_S)
    if hung:  # it goes on trying to reach a server that is gone
        say("the server was not reached; it will be told by the next worker")
        os._exit(0 if asked.is_set() else 1)
    beating.cancel()
    if not asked.is_set():
        why = next((task.exception() for task in ended if not task.cancelled()), None)
        raise UserError(f"the worker has lost its server ({why}); start it again")


def _telling(worker: "ProcessWorker", say: Callable[[str], None]) -> Callable[..., Any]:
    """Its method `run`, which says when a run of which deployment starts, and how it ended."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    run = worker.run

    async def told(flow_run: "FlowRun", configuration: Any, task_status: Any = None) -> Any:
        deployment = configuration.labels.get("prefect.io/deployment-name", "no deployment")
        name = f"run {flow_run.name!r} of {deployment}"
        say(f"{_now()} {name} starts")
        ended = await run(flow_run, configuration, task_status)
        how = ""
        with contextlib.suppress(httpx.TransportError, PrefectHTTPStatusError):
            state = (await worker.client.read_flow_run(flow_run.id)).state
            how = f": {state.name}" if state else ""
        say(f"{_now()} {name} has ended{how}")
        return ended

    return told


def _now() -> str:
    return f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"


class Pulse:
    """Ends this process where its event loop cannot: a thread looks whether that still turns.

    When a server is gone, a cancelled task's error may be its own context, and anyio (4.16, in
    TaskGroup) looks for the first of its contexts for ever: a processor is busy, nothing else in
    the loop goes on, and no signal is heeded.

    Args:
        say: is told why the process ends.
        limit_s: how long the loop may stand still.
    """

    def __init__(self, say: Callable[[str], None], limit_s: int = STUCK_S) -> None:
        self.code = 1
        """What the process would end with."""
        self._say, self._limit_s, self._missed = say, limit_s, 0
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True, name="pulse").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    async def beat(self) -> None:
        """Show that the loop turns, until this is cancelled."""
        while True:
            self._missed = 0
            await asyncio.sleep(POLL_S)

    def _watch(self) -> None:
        while self._missed < self._limit_s:
            if self._over.wait(1):  # counted, no clock: the whole process may have been stopped
                return
            self._missed += 1
        self._say("the worker hangs, its server is gone perhaps; it ends: start it again")
        _end_runs()
        os._exit(self.code)


async def _reconcile(root: Path, pool: str, say: Callable[[str], None]) -> None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    from vlfoundry.flows.pool import reconcile

    async with get_client() as client:
        answers = True
        while True:
            try:
                await client.hello()
                await reconcile(client, root, pool, say)
                if not answers:
                    say(f"{_now()} the server answers again")
                answers = True
            except (httpx.TransportError, PrefectHTTPStatusError) as error:
                if answers:
                    say(
                        f"{_now()} the server does not answer ({type(error).__name__}); "
                        "nothing can start until it does"
                    )
                answers = False
            await asyncio.sleep(RECONCILE_S)


def _end_runs() -> None:
    """Ask every run once to end, and wait for it."""
    deadline, told = time.monotonic() + STOP_GRACE_S, set[int]()
    while (runs := _runs()) and time.monotonic() < deadline:
        send(signal.SIGTERM, [pid for pid in runs if pid not in told])
        told |= set(runs)
        time.sleep(POLL_S)
    send(signal.SIGKILL, runs)


def _runs() -> list[int]:
    """Our own children that live: the processes of runs."""
    below = descendants(os.getpid())
    return [pid for pid in below if parent_of(pid) == os.getpid()]
