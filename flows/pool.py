"""Prefect's side of the worker: its work pool, and runs whose process is gone.

Import this after `flows.kept.connect`.
"""

import datetime
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import Crashed

from vlfoundry.flows.flowrun import living
from vlfoundry.flows.marks import is_held
from vlfoundry.infra.core.errors import UserError

TYPE = "process"
PENDING_LIMIT = datetime.timedelta(minutes=2)
"""A worker that has taken a run starts its process within seconds."""


def ensure_pool(name: str) -> bool:
    """Make the work pool, of processes, unless there is one; whether it was made.

    Raises UserError for one of another kind.
    """
    with get_client(sync_client=True) as client:
        try:
            kind = client.read_work_pool(name).type
        except ObjectNotFound:
            kind = None
        if kind is None:
            return _make(client, name)
    if kind != TYPE:
        raise UserError(
            f"the work pool {name!r} is of type {kind!r}, expected {TYPE!r}; name another with "
            "--pool"
        )
    return False


def _make(client: SyncPrefectClient, name: str) -> bool:
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    try:
        client.create_work_pool(WorkPoolCreate(name=name, type=TYPE, base_job_template=template))
    except ObjectAlreadyExists:
        return False  # somebody else was quicker
    return True


async def reconcile(
    client: PrefectClient, root: Path, pool: str, say: Callable[[str], None]
) -> None:
    """Give the state Crashed to runs of the project whose process is gone, and say which.

    Who is killed with kill -9 cannot tell the server. Whether a process lives is seen by the file
    that it holds; a run that some worker took and never started is known by its age.
    """
    for path in sorted(living(root).glob("*")):
        if not is_held(path):
            if found := await _read(client, path.name):
                await _crash(client, found, "its process was killed", say)
            path.unlink(missing_ok=True)
    for found in await _pending(client, pool):
        begun = found.state.timestamp if found.state else None
        late = begun is not None and datetime.datetime.now(datetime.UTC) - begun > PENDING_LIMIT
        if late and not (living(root) / str(found.id)).exists():
            await _crash(client, found, "its worker was killed before it began", say)


async def _read(client: PrefectClient, number: str) -> FlowRun | None:
    try:
        return await client.read_flow_run(UUID(number))
    except (ObjectNotFound, ValueError):
        return None  # of another server


async def _pending(client: PrefectClient, pool: str) -> list[FlowRun]:
    types = FlowRunFilterStateType(any_=[StateType.PENDING])
    return await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=types)),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
    )


async def _crash(
    client: PrefectClient, found: FlowRun, why: str, say: Callable[[str], None]
) -> None:
    if found.state is None or not found.state.is_final():
        await client.set_flow_run_state(found.id, Crashed(message=why), force=True)
        say(f"run {found.name}: {why}; its state is Crashed now")
