"""The command line answers at once, and a user's mistake is a message."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer.main
from typer.testing import CliRunner

from tests.support.cpu import least_cpu_s
from tests.support.tiny_project import write_model
from vlfoundry.eval.suites import linear_probe
from vlfoundry.flows.cli import app
from vlfoundry.infra.core.errors import DataError

pytestmark = pytest.mark.slow

COMMANDS = (
    "run", "evaluate", "parity", "import", "export", "merge", "plan", "recipes", "report",
    "models", "register", "lineage", "status", "chat-check", "new", "upgrade", "accept", "graph",
    "gc", "fetch", "pixels", "server", "worker", "deploy",
)  # fmt: skip


def vlfoundry(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlfoundry.flows.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_help_takes_a_third_of_a_second_and_names_every_command() -> None:
    shown = vlfoundry("--help")
    assert shown.returncode == 0
    for command in COMMANDS:
        assert f"  {command} " in shown.stdout
    assert least_cpu_s(lambda: vlfoundry("--help"), enough=0.3) < 0.3


@pytest.mark.parametrize("module", ["torch", "prefect", "dvc", "pyarrow", "numpy", "gto"])
def test_the_command_line_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, vlfoundry.flows.cli; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_outside_of_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    refused = vlfoundry("status", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("vlfoundry: ")
    assert "is not inside a VLFoundry project" in refused.stderr


def test_chat_files_are_checked_before_they_are_learnt_from(tmp_path: Path) -> None:
    talk = '"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]'
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(f"{{{talk}}}\n" * 3)
    bad.write_text(f"{{{talk}}}\n{{}}\n" * 3)
    fine = vlfoundry("chat-check", str(good))
    assert (fine.returncode, fine.stdout) == (0, f"{good}: 3 samples, 0 wrong\n")
    refused = vlfoundry("chat-check", str(good), str(bad), "--most", "2")
    assert refused.returncode == 1
    assert refused.stdout.splitlines()[1:] == [
        f"{bad}:2: conversations: got null, expected a list of turns {{from, value}}",
        f"{bad}:4: conversations: got null, expected a list of turns {{from, value}}",
        f"{bad}: and 1 more (--most)",
        f"{bad}: 6 samples, 3 wrong",
    ]


def test_weights_in_and_out(tmp_path: Path) -> None:
    golden = Path("tests/eval/golden/internvl_chat")
    imported = vlfoundry("import", str(golden), str(tmp_path / "ours"))
    assert imported.returncode == 0, imported.stderr
    assert "(internvl_chat) is the chat_simple in" in imported.stdout
    exported = vlfoundry(
        "export", str(tmp_path / "ours"), str(tmp_path / "back"), "--format", "internvl_chat"
    )
    assert exported.returncode == 0, exported.stderr


@pytest.mark.parametrize(
    ("suite", "data", "message"),
    [
        ("zeroshot", "data", "unknown suite 'zeroshot'"),
        ("zero_shot", "no/such/folder", "no/such/folder is not a directory"),
    ],
)
def test_a_wrong_suite_or_folder_does_not_wait_for_torch(
    tmp_path: Path, suite: str, data: str, message: str
) -> None:
    write_model(tmp_path, "internvl_c")
    words = ["evaluate", "--model", str(tmp_path), "--data", data, "--suite", suite]
    code = (
        "import atexit, sys; from vlfoundry.flows.cli import main\n"
        "heavy = {'torch', 'megatron'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = {['vlfoundry', *words, '--json', str(tmp_path / 'out.json')]!r}; main()"
    )
    refused = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert refused.returncode == 2, refused.stderr
    assert message in refused.stderr
    assert refused.stdout == "heavy: []\n"


def test_an_address_is_handed_on_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "vlfoundry.eval.runner.evaluate_folder", lambda *words, **_: asked.append(words) or []
    )
    words = ["evaluate", "--model", "m", "--data", "s3://bucket//set", "--suite", "retrieval"]
    ended = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "out.json")])
    assert ended.exit_code == 0, ended.output
    assert asked == [("m", "s3://bucket//set", "retrieval", tmp_path / "out.json")]


def test_the_option_that_a_suite_asks_for_exists() -> None:
    with pytest.raises(DataError) as refused:
        linear_probe.run(SimpleNamespace(), SimpleNamespace(folder="own"), SimpleNamespace())
    asked = re.findall(r"--[a-z][a-z-]*", str(refused.value))
    command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    assert asked
    assert set(asked) <= {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("option", [["--json", "~/s.json"], ["--json=~/s.json"]])
def test_a_place_at_home_is_at_home_even_if_the_shell_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    (tmp_path / "home").write_text("a file, so that nothing can be written")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    command = ["evaluate", "--model", "x", "--data", "~", "--suite", "retrieval", *option]
    ended = CliRunner().invoke(app, command)
    assert f"cannot write the scores to {tmp_path}/home/s.json" in str(ended.exception)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["import", "a", "b", "--profile", "one", "--profile=two"], "--profile"),
        (
            ["run", "--profile", "one", "--set", "a=1", "--set", "b=2", "--profile", "x"],
            "--profile",
        ),
        (["evaluate", "--model", "x", "--data", "y", "--model", "z"], "--model"),
    ],
)
def test_an_option_with_one_value_is_given_once(command: list[str], option: str) -> None:
    ended = CliRunner().invoke(app, command)
    assert str(ended.exception) == f"got {option} 2 times, expected one"
