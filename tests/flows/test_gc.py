"""Only `vlfoundry gc --delete` deletes training state, and of nobody who may still want it."""

import os
from pathlib import Path

from typer.testing import CliRunner

import flows.cli
from flows.gc import leftovers


def state(folder: Path, size: int, day: int) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "x").write_bytes(b"0" * size)
    os.utime(folder / "checkpoints" / "x", (day * 86_400, day * 86_400))


def test_what_was_set_aside_is_listed_and_deleted_when_told(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    state(tmp_path / "work/contrastive", 1000, 5)
    state(tmp_path / "work/contrastive.old-0123456789ab", 3_000_000, 9)
    state(tmp_path / "work/sft-simple.old-unknown.2", 700, 3)
    state(tmp_path / "work/workspaces/weekly/work/generative.old-ba9876543210", 50_000, 7)
    monkeypatch.chdir(tmp_path)
    assert [found.size_bytes for found in leftovers(tmp_path)] == [700, 50_000, 3_000_000]
    listed = CliRunner().invoke(flows.cli.app, ["gc"])
    assert "work/contrastive.old-0123456789ab  3.0 MB  last written 1970-01-10" in listed.output
    assert listed.output.endswith("3 folders; `vlfoundry gc --delete`\n")
    assert len(leftovers(tmp_path)) == 3
    deleted = CliRunner().invoke(flows.cli.app, ["gc", "--delete"])
    assert deleted.output.endswith("3.1 MB freed\n")
    assert not leftovers(tmp_path)
    assert (tmp_path / "work/contrastive/checkpoints/x").is_file()
    assert CliRunner().invoke(flows.cli.app, ["gc"]).output == "0 folders\n"
