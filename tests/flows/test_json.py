"""`--json` prints one object of a documented shape on stdout, and nothing else there."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlfoundry.flows.cli import app
from vlfoundry.infra.registry.gto import register_model

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def facts(name: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    ended = CliRunner().invoke(app, [*arguments, "--json"])
    assert ended.exit_code == code, ended.output
    found = json.loads(ended.stdout)
    assert found.pop("format") == f"vlfoundry.{name}.v1"
    return found


def test_status(trained: Path) -> None:
    stages = facts("status", "status")["stages"]
    assert [(s["name"], s["state"]) for s in stages] == [
        ("prepare", "up to date"), ("train@a", "up to date"), ("train@b", "up to date"),
        ("score", "stale"),
    ]  # fmt: skip
    assert stages[1]["upstream"] == ["prepare"]
    assert stages[1]["outputs"] == ["artifacts/train/a"]
    assert stages[1]["reason"] is None
    (trained / "source.txt").write_text("other rows\n")
    stages = facts("status", "status")["stages"]
    assert {s["state"] for s in stages} == {"stale"}
    assert "modified source.txt" in stages[0]["reason"]
    assert stages[1]["reason"] == "after prepare"


def test_models(trained: Path) -> None:
    assert facts("models", "models") == {"models": []}
    version = register_model(trained, Path("artifacts/train/a"), promote="champion")
    (found,) = facts("models", "models")["models"]
    assert found == {
        "ref": "toy_a@v0.1.0", "name": "toy_a", "version": "v0.1.0", "commit": version.commit,
        "created": version.created, "path": "artifacts/train/a", "md5": version.md5,
        "stages": ["champion"],
    }  # fmt: skip


def test_gc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    nothing = {"folders": [], "kept": [], "bytes": 0}
    assert facts("gc", "gc") == nothing | {"freed_bytes": None}
    state = tmp_path / "work/sft-full.old-unknown"
    state.mkdir(parents=True)
    (state / "x").write_bytes(b"0" * 1234)
    os.utime(state / "x", (86_400 * 7, 86_400 * 7))
    (folder,) = facts("gc", "gc")["folders"]
    assert (folder["path"], folder["bytes"]) == ("work/sft-full.old-unknown", 1234)
    assert (folder["step"], folder["run_key"]) == ("sft-full", None)
    assert folder["why"] == "set aside by an older version"
    assert folder["last_written"][:8] == "1970-01-"
    assert state.is_dir()
    last = tmp_path / "work/sft-full/0123456789ab"
    last.mkdir(parents=True)
    (last / "run_key").write_text("0123456789abcdef")
    told = facts("gc", "gc", "--delete")
    (kept,) = told["kept"]
    assert (kept["run_key"], kept["why"]) == ("0123456789abcdef", "the last of its step")
    assert told == {"folders": [folder], "kept": [kept], "bytes": 1234, "freed_bytes": 1234}
    assert not state.exists()


def test_plan() -> None:
    asked = ("plan", "internvl-c", "--gpus", "64", "--memory", "80", "--mfu", "0.3")
    found = facts("plan", *asked)
    assert (found["name"], found["kind"]) == ("internvl-c", "internvl_c")
    assert found["machine"]["ranks"] == 64
    assert found["machine"]["memory_bytes"] == 76 * GIB
    steps = [part["steps"] for part in found["parts"]]
    work = [(p["forward_flops"] + p["backward_flops"]) * p["steps"] for p in found["parts"]]
    assert len(steps) == 2
    assert found["flops"] == pytest.approx(sum(work) * found["batch_samples"])
    assert found["gpu_hours"] == pytest.approx(found["flops"] / 0.3 / 989e12 / 3600)
    best = found["layouts"][0]
    assert best["tensor"] * best["pipeline"] * best["data"] == 64
    parts = ("parameters", "gradients", "optimizer", "activations")
    assert best["memory_bytes"]["total"] == sum(best["memory_bytes"][part] for part in parts)
    times = [layout["step_seconds"] for layout in found["layouts"]]
    assert best["step_seconds"] <= 1.01 * min(times)
    assert sum(found["refused"].values()) > 0
    said = CliRunner().invoke(app, list(asked)).stdout
    assert f"{found['parameters']:,} parameters, {found['trained_parameters']:,} trained" in said


def test_recipes() -> None:
    found = facts("recipes", "recipes")
    named = {recipe["name"]: recipe for recipe in found["recipes"]}
    files = (ROOT / "profiles").glob("*.yaml")
    assert set(named) == {file.stem for file in files if "\nrecipe:" in file.read_text("utf-8")}
    assert len(named) == len(found["recipes"])
    one = facts("recipe", "recipes", "internvl-g")
    assert one["command"] == "vlfoundry run --profile internvl-g --stage generative"
    assert one["plan"]["gpu_hours"] == named["internvl-g"]["gpu_hours"]
    assert one["source"] == named["internvl-g"]["source"]


def test_chat_check(tmp_path: Path) -> None:
    talk = '"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]'
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(f"{{{talk}}}\n" * 3)
    bad.write_text(f"{{{talk}}}\n{{}}\n" * 4)
    assert facts("chat_check", "chat-check", str(good)) == {
        "good": True,
        "files": [{"path": str(good), "samples": 3, "wrong": 0, "problems": [], "notes": 0}],
    }
    found = facts("chat_check", "chat-check", str(good), str(bad), "--most", "2", code=1)
    assert found["good"] is False
    (_, report) = found["files"]
    assert (report["samples"], report["wrong"]) == (8, 4)
    assert [(p["line"], p["field"]) for p in report["problems"]] == [
        (2, "conversations"), (4, "conversations"),
    ]  # fmt: skip
    assert report["problems"][0]["message"].startswith("got null, expected a list of turns")


@pytest.mark.parametrize("command", ["status", "models", "plan", "lineage", "recipes", "gc"])
def test_the_option_is_everywhere_the_same(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "print one JSON object, for programs, and nothing else" in " ".join(shown.split())


@pytest.mark.parametrize("where", ["file", "-"])
def test_scores(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate --json` takes the file of the scores; `-` is stdout."""
    written: list[Path] = []

    def evaluate(model: str, data: str, suite: str, out: Path, **asked: Any) -> list:
        written.append(out)
        asked["log"]("a line for people")
        out.write_text('{"scores": 17}\n')
        return []

    monkeypatch.setattr("vlfoundry.eval.runner.evaluate_folder", evaluate)
    target = "-" if where == "-" else str(tmp_path / "scores.json")
    words = ["evaluate", "m", "--data", "d", "--suite", "retrieval", "--json", target]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    if where == "-":
        assert json.loads(ended.stdout) == {"scores": 17}
        assert ended.stderr == "a line for people\n"
        assert not written[0].parent.exists()
    else:
        assert ended.stdout == f"a line for people\nwritten to {target}\n"
        assert written == [Path(target)]
        quiet = CliRunner().invoke(app, ["-q", *words])
        assert quiet.stdout == ""
