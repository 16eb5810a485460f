"""Server, worker and deployments for real: ticks, parameters, kills, and the page of them."""

import os
import re
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.site import ROOT, Site, project_outside
from tests.support.toy_project import comes_to, sh, steer, wait_until

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "nightly-run.md"
TASKS = ("prepare", "train@a", "train@b", "score")
DONE = "COMPLETED"
# Busy until work/go is there.
BUSY = """
while not pathlib.Path("work/go").exists():
    pathlib.Path("work/started").touch()
    time.sleep(0.05)
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(project_outside(tmp_path), f"vlfoundry-test-{uuid.uuid4().hex}")
    yield made
    made.close()


def undisturbed(project: Path, place: Path) -> bytes:
    """dvc.lock of the same project after plain `dvc repro`."""
    sh(place, "git", "clone", "--quiet", str(project), "undisturbed")
    environment = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    subprocess.run(command, cwd=place / "undisturbed", env=environment, check=True, timeout=120)
    return (place / "undisturbed" / "dvc.lock").read_bytes()


def scripts(page: Path, **changed: str) -> list[str]:
    """The commands of a page, one text a block, with what a test has to have otherwise."""
    text = page.read_text("utf-8")
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    return re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_page_of_a_nightly_run(site: Site, tmp_path: Path) -> None:
    """A cron tick, a run with a changed parameter; what is in Prefect of both."""
    expected = undisturbed(site.root, tmp_path)
    serve, work, deploy, use, delete = scripts(PAGE, **{"0 3 * * *": "* * * * *"})
    assert (serve, work) == ("vlfoundry server\n", "vlfoundry worker\n")
    server, worker = site.serve(), site.work()
    said = site.sh(deploy + use)
    assert "pipeline/nightly" in said
    changed = site.ended("the run by hand", lambda run: bool(run["parameters"]["overrides"]))
    assert (changed["state_name"], changed["parameters"]["overrides"]) == ("Completed", ["seed=1"])
    tick = site.ended("a tick", lambda run: run["auto_scheduled"])
    assert tick["state_name"] == "Completed", site.logs(tick)
    assert tick["parameters"]["project"] == str(site.root)
    assert (site.root / "dvc.lock").read_bytes() == expected

    whole = [run for run in site.runs() if site.tasks(run)]
    assert whole
    for run in whole:
        comes_to(partial(site.tasks, run), dict.fromkeys(TASKS, "COMPLETED"))
        site.logged("4 of 4 stages to run", run)
    site.logged("hello from train-a", *whole)  # others may have its results from the cache
    assert (site.root.parent / "home" / "prefect.db").exists() is False  # no second server
    site.sh(use.splitlines()[0] + "\n" + delete)
    assert site.api("deployments/filter") == []
    assert worker.end() == 0
    assert f"run {changed['name']!r} of nightly starts" in worker.output
    assert f"run {changed['name']!r} of nightly has ended: Completed" in worker.output
    assert server.end() == 0
    assert site.processes("") == []


def test_kill_9_of_worker_and_flow(site: Site, tmp_path: Path) -> None:
    """Nothing is left, the server is told, and the next tick goes on to the same dvc.lock."""
    expected = undisturbed(site.root, tmp_path)
    steer(site.root, "prepare", BUSY)
    site.serve()
    worker = site.work()
    site.sh("vlfoundry deploy often --every 10s")
    started = site.root / "work/started"
    wait_until(started.exists, "the first tick")
    for flow in site.processes("flows.flowrun"):
        flow.kill()
    killed = site.ended("the end of the flow", lambda _: True)
    assert (killed["state_type"], killed["auto_scheduled"]) == ("CRASHED", True)
    wait_until(lambda: not site.processes("work.py"), "the end of its stage", limit_s=15)

    started.unlink()
    wait_until(started.exists, "the second tick")
    assert site.processes("flows.flowrun")
    worker.kill_9()
    wait_until(lambda: not site.processes("flowrun"), "the end of the flow", limit_s=5)
    server = {site.running[0].pid, *(p.pid for p in site.processes("create_app"))}
    wait_until(
        lambda: {p.pid for p in site.processes("")} == server, "the end of everything", limit_s=15
    )
    assert "Running" in [run["state_name"] for run in site.runs()]

    (site.root / "work/go").touch()
    worker = site.work()
    crashed = site.ended(
        "what the next worker says", lambda run: run["state"]["message"] == "its process was killed"
    )
    assert crashed["state_type"] == "CRASHED"
    site.ended("the next tick", lambda run: run["state_type"] == DONE)
    assert (site.root / "dvc.lock").read_bytes() == expected
    assert f"run {crashed['name']}: its process was killed" in worker.output


def test_a_busy_project_and_a_worker_that_is_stopped(site: Site) -> None:
    steer(site.root, "prepare", BUSY)
    site.serve()
    worker = site.work()
    site.sh("vlfoundry deploy refusing --if-busy refuse; vlfoundry deploy waiting --if-busy wait")
    first = site.start("run", until="prepare")  # a terminal's run keeps deployed ones out
    wait_until((site.root / "work/started").exists, "the first stage")
    site.deployed_run("refusing")
    refused = site.ended("the refusal", lambda _: True)
    assert (refused["state_type"], refused["state_name"]) == ("CANCELLED", "Refused")
    assert f"a run (process {first.process.pid}) goes on" in refused["state"]["message"]
    assert "Traceback" not in site.logs(refused)

    site.deployed_run("waiting")
    wait_until(lambda: "waiting for it to end" in worker.output, "the run that waits")
    site.deployed_run("waiting")
    same = site.ended("a second one that waits", lambda run: run["id"] != refused["id"])
    assert same["state_name"] == "Refused"
    assert "is waiting already" in same["state"]["message"]
    (site.root / "work/go").touch()
    assert first.process.wait(60) == 0
    waited = site.ended(
        "the run that waited", lambda run: bool(run["deployment_id"]) and run["state_type"] == DONE
    )
    assert "4 up to date" in waited["state"]["message"]

    (site.root / "work/go").unlink()
    (site.root / "work/started").unlink()
    (site.root / "source.txt").write_text("other rows\n")
    site.deployed_run("waiting")
    wait_until((site.root / "work/started").exists, "the stage of the last run")
    assert worker.end() == 0
    last = site.runs()[-1]
    assert last["state_name"] == "Cancelled"
    assert [p.pid for p in site.processes("work.py")] == []


def test_a_server_is_kept(site: Site) -> None:
    """One a project, with a credential for its owner alone; a killed one is no server."""
    home = site.root / "work/prefect"
    server = site.serve()
    assert f"http://127.0.0.1:{site.port}" in server.output
    for name in ("credential", "server.json"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600
    second = site.run("vlfoundry", "server")
    assert second.returncode == 2
    assert f"runs already at http://127.0.0.1:{site.port}; stop it first" in second.stdout
    credential = site.server.credential
    site.environment |= {"PREFECT_API_URL": site.server.url, "PREFECT_API_AUTH_STRING": "vl:x"}
    refused = site.run("vlfoundry", "deploy", "x")
    assert refused.returncode == 2
    assert "asks for a credential, got a wrong one" in refused.stdout
    del site.environment["PREFECT_API_URL"], site.environment["PREFECT_API_AUTH_STRING"]

    site.sh("vlfoundry run")  # finds the server by itself
    assert [run["state_name"] for run in site.runs()] == ["Completed"]

    server.kill_9()
    wait_until(lambda: not site.processes(""), "the end of the killed server", limit_s=10)
    assert (home / "server.json").exists()
    asked = site.run("vlfoundry", "server", "--env")
    assert asked.returncode == 2
    assert "no Prefect server is kept" in asked.stdout
    assert site.serve().process.poll() is None
    assert site.server.credential == credential
    assert [run["state_name"] for run in site.runs()] == ["Completed"]


def test_plain_prefect_deploy(site: Site) -> None:
    """From the prefect.yaml that a project has."""
    site.serve()
    worker = site.work()  # it makes the pool
    site.environment |= site.server.environment
    write = "from pathlib import Path; from vlfoundry.flows.deploy import prefect_yaml; "
    write += "Path('prefect.yaml').write_text(prefect_yaml(Path.cwd()))"
    assert site.run(sys.executable, "-c", write).returncode == 0
    site.sh("prefect --no-prompt deploy --name nightly")
    site.sh("prefect deployment run pipeline/nightly --param 'stages=[\"train@a\"]'")
    run = site.ended("the run", lambda _: True)
    assert run["state_name"] == "Completed", site.logs(run)
    comes_to(partial(site.tasks, run), dict.fromkeys(TASKS[:2], "COMPLETED"))
    assert "workspace" not in worker.output
    schedules = site.api("deployments/filter")[0]["schedules"]
    assert [entry["schedule"]["cron"] for entry in schedules] == ["0 3 * * *"]
    began = time.monotonic()
    site.sh("vlfoundry deploy nightly")  # again, at no set time
    assert site.api("deployments/filter")[0]["schedules"] == []
    assert time.monotonic() - began < 60
