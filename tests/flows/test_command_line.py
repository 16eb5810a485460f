"""What the command line offers as a whole: versions, verbosity, completion, `python -m`."""

import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.cpu import least_cpu_s
from tests.support.toy_project import steer
from vlfoundry.flows.cli import app
from vlfoundry.infra.registry.gto import register_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HEAVY = "sorted({'torch', 'megatron', 'prefect', 'dvc', 'transformers'} & set(sys.modules))"


def vlfoundry(
    *words: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlfoundry", *words],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_version_without_importing_what_it_tells_of() -> None:
    code = (
        "import atexit, sys; from vlfoundry.flows.cli import main\n"
        f"atexit.register(lambda: print({HEAVY}))\n"
        "sys.argv = ['vlfoundry', '--version']; main()"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, heavy = told.stdout.splitlines()
    versions = {name: importlib.metadata.version(name) for name in ("vlfoundry", "torch")}
    assert line.startswith(f"vlfoundry {versions['vlfoundry']} (Python {sys.version.split()[0]}, ")
    assert f"torch {versions['torch']}, " in line
    assert heavy == "[]"


def test_python_m_is_the_same_command() -> None:
    shown = vlfoundry("--help")
    installed = subprocess.run(
        [str(Path(sys.prefix) / "bin" / "vlfoundry"), "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == installed.stdout
    assert shown.stdout.startswith("Usage: vlfoundry [OPTIONS] COMMAND")
    assert vlfoundry().stdout == shown.stdout


def test_verbose_shows_where_a_mistake_was_found() -> None:
    words = ("plan", "contrastive", "--gpus", "8", "--memory", "80", "--set", "seed=[")
    plain, verbose = vlfoundry(*words), vlfoundry("-v", *words)
    assert (plain.returncode, verbose.returncode) == (2, 2)
    assert plain.stderr.count("\n") == 1
    assert verbose.stderr.endswith(plain.stderr)
    assert "Traceback" in verbose.stderr
    assert "ruamel.yaml" in verbose.stderr  # the cause


@pytest.mark.parametrize("option", ["-q", "-v"])
def test_a_run_tells_as_much_as_it_is_asked_for(
    toy: Path, prefect_server: str, option: str
) -> None:
    steer(toy, "train-b", "sys.exit('no b today')")
    ended = vlfoundry(option, "run", cwd=toy)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "train@b failed; its last lines:" in ended.stdout
    assert "no b today" in ended.stdout
    told = ("stages to run", "▶ prepare", "Running stage 'prepare'")
    assert {text in ended.stdout for text in told} == {option == "-v"}
    assert ("| prefect" in ended.stderr) == (option == "-v"), ended.stderr


def test_quiet_is_what_programs_want_of_a_run_with_nothing_to_do(
    trained: Path, prefect_server: str
) -> None:
    ended = vlfoundry("--quiet", "run", "--stage", "train", cwd=trained)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


def complete(cwd: Path, *words: str) -> list[str]:
    """What bash is offered for the last word."""
    ended = vlfoundry(
        cwd=cwd, _VLFOUNDRY_COMPLETE="complete_bash", COMP_WORDS=" ".join(["vlfoundry", *words]),
        COMP_CWORD=str(len(words)),
    )  # fmt: skip
    assert ended.stderr == ""
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ev"], ["evaluate"]),
        (["evaluate", "--suite", "z"], ["zero_shot"]),
        (["run", "--stage", "sft"], ["sft@simple", "sft@full"]),
        (["run", "--profile", "ho"], ["hour"]),
        (["run", "--set", "contrastive.train.l"], ["contrastive.train.lr=", "log_every"]),
        (["export", "x", "y", "--format", "internvl_1"], ["internvl_14b"]),
        (["import", "x", "y", "--kind", "v"], ["vision"]),
        (["plan", "internvl-g-c"], ["internvl-g-coco"]),
        (["recipes", "chat-v1.1"], ["chat-v1.1-finetune", "chat-v1.1-pretrain"]),
        (["chat-check", "--variant", "f"], ["full"]),
        (["pixels", "--for", "t"], ["train"]),
        (["pixels", "--task", "c"], ["caption", "chat"]),
    ],
)
def test_values_are_completed(words: list[str], offered: list[str]) -> None:
    found = complete(ROOT, *words)
    assert len(found) == len(offered)
    assert all(part in name for part, name in zip(offered, found, strict=True))
    assert least_cpu_s(lambda: complete(ROOT, *words), enough=1) < 1  # no PyTorch, no DVC


def test_registered_models_are_completed(trained: Path, tmp_path: Path) -> None:
    register_model(trained, Path("artifacts/train/a"), promote="champion")
    assert complete(trained, "lineage", "toy") == ["toy_a@v0.1.0", "toy_a#champion"]
    assert complete(tmp_path, "lineage", "toy") == []  # no project: nothing, and no error


def test_profiles_of_a_project_are_completed_beside_ours(toy: Path, tmp_path: Path) -> None:
    (toy / "profiles/hourly.yaml").touch()
    assert complete(toy, "run", "--profile", "ho") == ["hour", "hourly"]
    assert complete(toy, "deploy", "x", "--profile", "ho") == ["hour", "hourly"]
    assert complete(tmp_path, "new", "team", "--from", "ho") == ["hour"]  # where no project is


def test_completion_can_be_shown_and_installed() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "--install-completion" in shown
    # Which shell it is, it asks its parents: that of the tests may be none.
    command = f"{shlex.quote(sys.executable)} -m vlfoundry --show-completion; true"
    shown = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "_VLFOUNDRY_COMPLETE" in shown.stdout, shown.stderr
