"""What a deployment runs: `vlfoundry run` as a flow with parameters, of which Prefect makes a form.

The flow run that Prefect has begun is the record: its tasks are the stages. It ends as Promoted or
Rejected where a gate has judged, as Refused where another run was at work and this one must not
wait, as Completed, Failed or Cancelled otherwise.

Nothing is downloaded: a deployment names this module, which is installed where the worker is.
"""

import logging
import os
from pathlib import Path
from typing import Annotated, Literal

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, FailedRun
from prefect.runtime import flow_run
from prefect.states import Cancelled, Failed
from pydantic import Field

from vlfoundry.flows.launch import EXTERNAL, run_deployed
from vlfoundry.flows.lock import BusyError
from vlfoundry.flows.pipeline import FLOW, run_in_flow
from vlfoundry.flows.terminal import Terminal
from vlfoundry.flows.turn import turn
from vlfoundry.flows.walk import Run
from vlfoundry.flows.workspace import Variation
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.project import find_root

ENDINGS = (CancelledRun, FailedRun)
Override = Annotated[str, Field(pattern=r"^[^=\s]+=")]


@flow(name=FLOW, persist_result=False)
def pipeline(
    project: Path = Path(),
    profile: str | None = None,
    stages: list[str] = [],  # noqa: B006 - Prefect shows it in the form, and nobody changes it
    overrides: list[Override] = [],  # noqa: B006
    if_busy: Literal["wait", "refuse"] = "wait",
) -> State:
    """Bring a project's pipeline up to date, from the raw pairs to the gate and the report.

    Stages that are up to date are not run. With a profile or overrides the run has a workspace of
    its own, and params.yaml stays as it is.

    Args:
        project: its folder on the worker's machine; `.` is the one that the worker serves.
        profile: a file of profiles/, without its ending, merged over params.yaml.
        stages: only these and what they need, such as `sft@full`; none: all.
        overrides: parameters of this run, KEY=VALUE, such as `contrastive.train.lr=5.0e-4`.
        if_busy: what to do when another run is at work: `wait` for its end, or `refuse`, which
            ends this one at once, as Refused.

    Returns:
        How it ended.
    """
    logging.getLogger("prefect.flow_runs").addFilter(_is_news)
    terminal, states = _Told(), list[State]()
    varied = Variation(profile=profile, overrides=tuple(overrides))
    wait = if_busy == "wait"

    try:
        root = find_root(project)
        asked, name = [profile, sorted(stages), list(overrides)], flow_run.get_name() or ""
        with turn(root, name, asked, terminal.say, wait=wait) as begin:

            def record(run: Run) -> None:
                begin()
                states.append(run_in_flow(run, os.environ.get(EXTERNAL)))

            run_deployed(
                root, record, stages=tuple(stages), terminal=terminal, wait=wait,
                variation=varied if profile or overrides else None,
            )  # fmt: skip
    except BusyError as error:
        terminal.say(str(error))
        return Cancelled(name="Refused", message=str(error))
    except UserError as error:
        terminal.say(str(error))
        return Failed(message=str(error))
    return states[-1]


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to keep a line of the log: Prefect's engine tells each bad ending as a traceback of
    itself, after the state."""
    return not (record.exc_info and isinstance(record.exc_info[1], ENDINGS))


class _Told(Terminal):
    """What a terminal shows of a run goes to the log of the flow run too; the stages' own lines go
    to those of their tasks."""

    def tell(self, text: str) -> None:
        super().tell(text)
        for line in filter(None, text.splitlines()):
            get_run_logger().info(line)
