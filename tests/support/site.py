"""A project outside of the repository, with a server and workers of its own, as a team has them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.support.toy_project import commit_all, make_toy, wait_until
from vlfoundry.flows.kept import Kept, kept

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.prefix) / "bin"
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


def project_outside(place: Path) -> Path:
    """A project whose code is that of this checkout and lies elsewhere."""
    root = make_toy(place / "myteam")
    definition = root / "dvc.yaml"  # in which its first stage may be kept busy for longer
    definition.write_text(definition.read_text().replace("timeout_s: 60", "timeout_s: 600"))
    commit_all(root)
    return root


class Site:
    """The project, and what was started for it.

    Args:
        root: the project.
        mark: of all of its processes.
    """

    def __init__(self, root: Path, mark: str) -> None:
        self.root, self.mark, self.port = root, mark, free_port()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(root.parent / "home"),
            "DO_NOT_TRACK": "1",
            "COLUMNS": "300",
            "PREFECT_WORKER_QUERY_SECONDS": "1",  # not 10: tests wait for it
            "VLFOUNDRY_TEST_MARK": mark,
        }
        self.running: list[subprocess.Popen] = []

    def start(self, *arguments: str, until: str) -> "Process":
        """Start a command that stays, and wait until it has printed `until`."""
        log = self.root.parent / f"{len(self.running)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["vlfoundry", *arguments], executable=str(PROGRAMS / "vlfoundry"), cwd=self.root,
                env=self.environment, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.running.append(process)
        started = Process(process, log)
        wait_until(lambda: until in started.output or process.poll() is not None, until)
        assert process.poll() is None, started.output
        return started

    def serve(self) -> "Process":
        return self.start("server", "--port", str(self.port), until="for commands of Prefect")

    def work(self) -> "Process":
        return self.start("worker", until="Ctrl-C ends it")

    def sh(self, script: str) -> str:
        """Run a shell's commands to their end, and return what they printed."""
        done = self.run("bash", "-euc", script)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            command, cwd=self.root, env=self.environment, text=True, timeout=240, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def api(self, path: str, **body: Any) -> Any:
        """POST to the server."""
        server = self.server
        request = urllib.request.Request(
            f"{server.url}/{path}", json.dumps(body).encode(),
            {"Content-Type": "application/json",
             "Authorization": f"Basic {b64encode(server.credential.encode()).decode()}"},
        )  # fmt: skip
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 60
        while True:
            try:
                return json.load(opener.open(request, timeout=60))
            except urllib.error.HTTPError as error:
                # Its database was locked: Prefect's own clients try again, too.
                if error.code != 503 or time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def deployed_run(self, name: str) -> None:
        """Ask for a run of a deployment, as `prefect deployment run` does in four seconds."""
        wanted = {"name": {"any_": [name]}}
        (deployment,) = self.api("deployments/filter", deployments=wanted)
        self.api(f"deployments/{deployment['id']}/create_flow_run", state={"type": "SCHEDULED"})

    @property
    def server(self) -> Kept:
        found = kept(self.root)
        assert found
        return found

    def runs(self) -> list[dict[str, Any]]:
        """All flow runs that began or ended, the first first."""
        found = self.api("flow_runs/filter", sort="START_TIME_ASC")
        return [run for run in found if run["state_type"] != "SCHEDULED"]

    def ended(self, what: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until a flow run that is wanted has ended; the first one."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [r for r in self.runs() if r["state_type"] in FINAL and wanted(r)]
            return bool(found)

        wait_until(look, what, limit_s=150)
        return found[0]

    def logs(self, run: dict[str, Any]) -> str:
        """What is logged of a flow run, its tasks included."""
        wanted = {"flow_run_id": {"any_": [run["id"]]}}
        found = self.api("logs/filter", logs=wanted, sort="TIMESTAMP_ASC")
        return "\n".join(line["message"] for line in found)

    def logged(self, line: str, *runs: dict[str, Any]) -> None:
        """Wait for a line in the log of one of the runs: it is sent some time after it is said."""
        wait_until(lambda: any(line in self.logs(run) for run in runs), line, limit_s=30)

    def tasks(self, run: dict[str, Any]) -> dict[str, str]:
        """Name and state of each task."""
        found = self.api("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
        return {task["name"]: task["state_type"] for task in found}

    def processes(self, part: str) -> list[psutil.Process]:
        """Living processes of the site with `part` in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get("VLFOUNDRY_TEST_MARK") == self.mark:
                    found += [process] if part in " ".join(process.cmdline()) else []
        return found

    def close(self) -> None:
        """End everything, the server last; fails the test if something has to be killed."""
        for process in reversed(self.running):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        left = {process.pid: process.cmdline()[-3:] for process in self.processes("")}
        for process in self.processes(""):
            process.kill()
        for process in self.running:
            process.wait()
        assert left == {}


class Process:
    """A command that stays."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def kill_9(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def end(self) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
