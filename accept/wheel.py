"""A project of one's own: the wheel in an empty environment, no checkout anywhere near.

The checks build on each other, in their order.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from accept.clone import ROOT
from accept.meter import Measured, measure
from accept.small import shortened

pytestmark = pytest.mark.accept

MINUTE = 60.0
STAGES = 17
TRACE = "VLFOUNDRY_TRACE"
TRACER = """\
import atexit, os, sys

def leave():
    files = [m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] == "vlfoundry"]
    with open(os.path.join(os.environ["VLFOUNDRY_TRACE"], f"{os.getpid()}"), "a") as file:
        file.write("".join(f"{name}\\n" for name in files))

if "VLFOUNDRY_TRACE" in os.environ:
    atexit.register(leave)
"""
"""by which each process leaves the files of our modules in a folder when it ends"""
Record = Callable[[str, Any], None]


class Site:
    """A source tree of HEAD, an environment made of its wheel, and projects beside both."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.source, self.env, self.traces = place / "source", place / "env", place / "traces"
        uv = ROOT / ".cache" / "uv" / "bin" / "uv"
        self.uv = shutil.which("uv") or str(uv)
        clone = ["git", "clone", "--quiet", "--no-tags", str(ROOT), str(self.source)]
        subprocess.run(clone, check=True)
        python = str(ROOT / ".venv" / "bin" / "python")
        self._uv("venv", "--python", python, str(self.env))
        lock = self.source / "requirements" / "core.lock"
        self._uv("pip", "sync", *self._into, "--require-hashes", str(lock))
        self.traces.mkdir()
        (self.packages / "trace_of_imports.py").write_text(TRACER)
        (self.packages / "trace_of_imports.pth").write_text("import trace_of_imports\n")

    @property
    def packages(self) -> Path:
        return next((self.env / "lib").glob("python3*")) / "site-packages"

    @property
    def _into(self) -> tuple[str, str]:
        return "--python", str(self.env / "bin" / "python")

    def install(self) -> Path:
        """Build the wheel of the source tree as it is, and install it alone."""
        out = self.place / "dist"
        shutil.rmtree(out, ignore_errors=True)
        build = ["build", "--no-build-isolation", "--out-dir", str(out), str(self.source)]
        self._uv(*build, VIRTUAL_ENV=str(ROOT / ".venv"))
        (wheel,) = out.glob("*.whl")
        self._uv("pip", "install", *self._into, "--no-deps", "--reinstall", str(wheel))
        return wheel

    def _uv(self, *arguments: str, **variables: str) -> None:
        command = [self.uv, *arguments, "--quiet"]
        subprocess.run(command, check=True, env={**os.environ, **variables})

    def vlfoundry(self, project: Path, *arguments: str, limit_s: float = 10 * MINUTE) -> Measured:
        return measure([str(self.env / "bin" / "vlfoundry"), *arguments], project, limit_s)

    def stale(self, project: Path) -> set[str]:
        """The stages that would run."""
        told = self.vlfoundry(project, "status", "--json")
        stages = json.loads(told.output)["stages"]
        assert len(stages) == STAGES
        return {stage["name"] for stage in stages if stage["state"] == "stale"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The site; its environment is the only one that processes see."""
    made = Site(tmp_path_factory.mktemp("wheel"))
    home = made.place / "home"
    home.mkdir()
    (home / ".gitconfig").write_text("[user]\n    name = Team\n    email = team@localhost\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("PYTHON", "VIRTUAL_ENV", "PREFECT_", "VLFOUNDRY_", "DVC_")):
                patch.delenv(name)
        patch.setenv("PATH", f"{made.env / 'bin'}{os.pathsep}/usr/local/bin:/usr/bin:/bin")
        patch.setenv("UV_CACHE_DIR", _uv_cache(made.uv))
        patch.setenv("HOME", str(home))
        patch.setenv(TRACE, str(made.traces))
        made.install()
        yield made


def _uv_cache(uv: str) -> str:
    ended = subprocess.run([uv, "cache", "dir"], check=True, capture_output=True, text=True)
    return ended.stdout.strip()


@pytest.fixture(scope="module")
def team(site: Site) -> Path:
    """A project that `vlfoundry new` made, its run made short."""
    made = site.vlfoundry(site.place, "new", "my team")
    assert made.code == 0, made.output
    project = site.place / "my team"
    params = project / "params.yaml"
    short = re.sub(r"save_every_steps: \d+", "save_every_steps: 2", shortened(params.read_text()))
    params.write_text(short)
    subprocess.run(["git", "commit", "--quiet", "-am", "short"], cwd=project, check=True)
    return project


@pytest.fixture(scope="module")
def first(site: Site, team: Path) -> Measured:
    return site.vlfoundry(team, "run", limit_s=20 * MINUTE)


def test_the_first_run(site: Site, team: Path, first: Measured, record_property: Record) -> None:
    record_property("wall_s", first.wall_s)
    record_property("cpu_s", first.cpu_s)
    assert first.code == 0, first.output[-3000:]
    assert first.output.count(": ran, ") == STAGES
    assert (team / "work/report/index.html").is_file()
    assert "internvl_c@v0.1.0" in site.vlfoundry(team, "models").output


def test_no_module_comes_from_elsewhere(site: Site, first: Measured) -> None:
    traces = [path.read_text().splitlines() for path in site.traces.iterdir()]
    loaded = [lines for lines in traces if lines]
    assert len(loaded) > STAGES
    folder = str(site.packages / "vlfoundry")
    assert {file for lines in loaded for file in lines if not file.startswith(folder)} == set()
    stages = {Path(file).stem for lines in loaded for file in lines if "/stages/" in file}
    assert {"ingest", "contrastive", "sft", "evaluate", "report"} <= stages


def test_a_second_run_finds_nothing_to_do(
    site: Site, team: Path, first: Measured, record_property: Record
) -> None:
    lock = (team / "dvc.lock").read_bytes()
    again = site.vlfoundry(team / "data", "run")
    record_property("cpu_s", again.cpu_s)
    assert again.code == 0, again.output
    assert "nothing to do" in again.output
    assert (team / "dvc.lock").read_bytes() == lock


def test_dvc_alone_agrees(site: Site, team: Path, first: Measured) -> None:
    lock = (team / "dvc.lock").read_bytes()
    ended = measure([str(site.env / "bin" / "dvc"), "repro"], team, 10 * MINUTE)
    assert ended.code == 0, ended.output[-3000:]
    assert (team / "dvc.lock").read_bytes() == lock


def test_what_a_kill_cut_short_goes_on(site: Site, team: Path, first: Measured) -> None:
    """kill -9 of all of it while stage 1 trains; the lock is that of the run that nobody cut."""
    place = site.place / "killed"
    subprocess.run(["git", "clone", "--quiet", str(team), str(place)], check=True)
    process = subprocess.Popen(
        [str(site.env / "bin" / "vlfoundry"), "run"], cwd=place, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    begun, deadline = place / "work/contrastive", time.monotonic() + 10 * MINUTE
    while not list(begun.glob("*/checkpoints/step-*[1-9]*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    tree = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive
    resumed = site.vlfoundry(place, "run", limit_s=20 * MINUTE)
    assert resumed.code == 0, resumed.output[-3000:]
    assert re.search(r"contrastive . going on after step [1-9]", resumed.output)
    assert "shard: ran" not in resumed.output
    assert (place / "dvc.lock").read_bytes() == (team / "dvc.lock").read_bytes()


def test_a_run_with_another_seed(site: Site, team: Path, first: Measured) -> None:
    before = (team / "params.yaml").read_bytes(), (team / "dvc.lock").read_bytes()
    ended = site.vlfoundry(team, "run", "--set", "seed=1", "--stage", "contrastive")
    assert ended.code == 0, ended.output[-3000:]
    (place,) = (team / "work/workspaces").iterdir()
    other = place / "artifacts/contrastive/lineage.json"
    assert json.loads(other.read_text())["parameters"]["seed"] == 1
    assert ((team / "params.yaml").read_bytes(), (team / "dvc.lock").read_bytes()) == before
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    told = subprocess.run(status, cwd=team, capture_output=True, text=True, check=True)
    assert told.stdout == "?? dvc.lock\n"


def test_profiles_and_launchers_of_the_project(
    site: Site, team: Path, first: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (team / "profiles/few.yaml").write_text("ingest: {classes: 30}\n")
    (team / "launchers/alone.yaml").write_text("ranks: 1\n")
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", "alone")
    ended = site.vlfoundry(team, "run", "--profile", "few", "--stage", "pretrain_text")
    assert ended.code == 0, ended.output[-3000:]
    place = team / "work/workspaces/few"
    rates = json.loads((place / "work/throughput/pretrain_text.json").read_text())
    classes = json.loads((place / "artifacts/ingest/lineage.json").read_text())["parameters"]
    assert classes["ingest"]["classes"] == 30
    assert rates
    plan = ("plan", "contrastive", "--gpus", "8", "--memory", "80", "--profile")
    assert site.vlfoundry(team, *plan, "few").code == 0
    assert site.vlfoundry(team, *plan, "base").code == 0
    refused = site.vlfoundry(team, *plan, "none")
    assert refused.code == 2
    assert "one of ['few'] (files of profiles/) or of ['base'" in refused.output


def test_its_models_are_used(site: Site, team: Path, first: Measured) -> None:
    scores = ["--data", "data", "--source", "twemoji", "--suite", "retrieval", "--lang", "it"]
    asked = site.vlfoundry(team, "evaluate", "champion", *scores, "--json", "work/own.json")
    assert asked.code == 0, asked.output
    assert json.loads((team / "work/own.json").read_text())["scores"]
    code = "import vlfoundry; print(vlfoundry.load('champion').kind)"
    python = str(site.env / "bin" / "python")
    assert measure([python, "-c", code], team, MINUTE).output == "internvl_c\n"
    rows = site.vlfoundry(team, "lineage", "champion", "--rows", "work/rows.parquet")
    assert rows.code == 0, rows.output


def test_another_version_of_comments_leaves_nothing_stale(
    site: Site, team: Path, first: Measured
) -> None:
    for folder in ("eval", "flows", "infra", "models", "stages"):
        for path in (site.source / folder).rglob("*.py"):
            text = path.read_text("utf-8")
            if text.startswith('"""'):
                path.write_text(f'# A line more.\n"""Another word. {text[3:]}\n\n# And the end.\n')
    site.install()
    upgraded = site.vlfoundry(team, "upgrade")
    assert upgraded.code == 0, upgraded.output
    assert site.stale(team) == set()
    assert "nothing to do" in site.vlfoundry(team, "run").output


def test_another_loss_makes_its_steps_stale(site: Site, team: Path, first: Measured) -> None:
    path = site.source / "models/objectives/generative.py"
    path.write_text(path.read_text("utf-8") + "\n\nANOTHER = 1\n")
    site.install()
    upgraded = site.vlfoundry(team, "upgrade")
    assert "generative" in upgraded.output, upgraded.output
    stale = site.stale(team)
    assert {"generative", "sft@full", "evaluate@internvl_g", "report"} <= stale
    assert not stale & {"ingest", "shard", "pretrain_text", "contrastive", "sft@simple"}
    reason = "a constant that nobody uses"
    told = site.vlfoundry(team, "accept", "generative", "--because", reason)
    assert told.code == 0, told.output
    left = site.stale(team)
    assert "generative" not in left
    assert left <= stale


def test_an_older_version_refuses_a_newer_project(site: Site, team: Path, first: Measured) -> None:
    path = site.source / "infra/core/project.py"
    newer = re.sub(
        r"^PROJECT_FORMAT = (\d+)", lambda m: f"PROJECT_FORMAT = {int(m[1]) + 1}",
        path.read_text("utf-8"), flags=re.MULTILINE,
    )  # fmt: skip
    definition = (team / "dvc.yaml").read_text()
    (team / "dvc.yaml").write_text(
        re.sub(r"project_format: (\d+)", lambda m: f"project_format: {int(m[1]) + 1}", definition)
    )
    for command in ("run", "status", "upgrade"):
        refused = site.vlfoundry(team, command)
        assert refused.code == 2, refused.output
        assert "knows formats up to" in refused.output
    path.write_text(newer)
    site.install()
    assert site.vlfoundry(team, "status").code == 0
