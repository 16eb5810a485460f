"""The process of one deployed run: `python -P -m vlfoundry.flows.flowrun`, which a worker starts.

It is Prefect's engine with two things that have to be there before its imports: the kernel kills
it when its worker is gone, for else a run would go on that nobody watches; and it holds a file for
as long as it lives, by which the next worker knows whose state on the server is out of date.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from vlfoundry.flows.marks import mark
from vlfoundry.flows.server import prefect_environment
from vlfoundry.infra.core.process import die_with_parent

COMMAND = "python -P -m vlfoundry.flows.flowrun"
RUN_ID = "PREFECT__FLOW_RUN_ID"
WORKER = "VLFOUNDRY_WORKER"
"""process number of the worker; others than ours do not tell it"""


def living(root: Path) -> Path:
    """The folder of the files that runs hold, named by their ids."""
    return root / "work" / "prefect" / "runs"


def main() -> None:
    """Run what the worker has put into the environment; ends as Prefect's engine does."""
    die_with_parent(signal.SIGKILL)
    if os.environ.get(WORKER, str(os.getppid())) != str(os.getppid()):
        raise SystemExit(1)  # it was gone before we asked
    os.setsid()  # Ctrl-C is the worker's to hear, who passes it on
    root = Path.cwd()
    for name, value in prefect_environment(root).items():
        os.environ.setdefault(name, value)
    sys.argv = sys.argv[:1]
    path = living(root) / os.environ[RUN_ID]
    with mark(path, "the sign of life of the run"):
        runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
