"""Workers and packing are a matter of the place: they change how fast a stage learns, not what."""

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import artifacts, run_stage

MADE = "artifacts/sft/simple"


@pytest.fixture
def again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train `sft simple` again under a launcher profile; returns the project's folder."""

    def run(profile: str) -> Path:
        root = tmp_path / "again"
        shutil.copytree(trained, root, ignore=shutil.ignore_patterns("work"), symlinks=True)
        shutil.rmtree(root / MADE)
        (tmp_path / "place.yaml").write_text(profile)
        monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(tmp_path / "place.yaml"))
        run_stage(root, "sft", "variant=simple")
        return root

    return run


def steps(root: Path) -> list[dict[str, float]]:
    return json.loads((root / MADE / "history.json").read_text("utf-8"))["steps"]


def test_workers_change_no_bit(trained: Path, again) -> None:
    assert artifacts(again("workers: 2\n"), "sft/simple") == artifacts(trained, "sft/simple")


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_samples_are_learnt_as_padded_ones_are(trained: Path, again, ranks: int) -> None:
    root = again(f"ranks: {ranks}\nworkers: 1\npacking: {{max_tokens: 120, max_tiles: 4}}\n")
    for packed, padded in zip(steps(root), steps(trained), strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


def test_a_sample_that_fits_no_pack_is_refused(trained: Path, again) -> None:
    with pytest.raises(AssertionError, match=r"sample \d+ of the step has \d+ tokens and 1 tiles"):
        again("packing: {max_tokens: 8}\n")
