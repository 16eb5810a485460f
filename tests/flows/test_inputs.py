"""What a run lacks is said before its first stage."""

import io
import sys
from pathlib import Path

import pytest

from tests.support.toy_project import DVC_YAML, sh
from vlfoundry.flows.launch import run_pipeline
from vlfoundry.flows.terminal import Terminal
from vlfoundry.infra.core.errors import DataError


def run(root: Path, *stages: str) -> None:
    run_pipeline(root, stages=stages, terminal=Terminal(io.StringIO()))


def reading(toy: Path, *paths: str) -> Path:
    """The toy, whose last stage reads more."""
    before = "deps: [artifacts/train/a, artifacts/train/b]"
    assert before in DVC_YAML
    after = f"deps: [artifacts/train/a, {', '.join(paths)}]"
    (toy / "dvc.yaml").write_text(DVC_YAML.replace(before, after))
    return toy


def test_files_that_nobody_makes(toy: Path) -> None:
    reading(toy, *(f"data/{name}" for name in "pqrst"), "artifacts/train/b/weights")
    expected = r"score reads data/p, data/q, data/r and 2 more, which do not exist; put them there"
    with pytest.raises(DataError, match=expected):
        run(toy)
    assert not (toy / "artifacts").exists()
    (toy / "data").mkdir()
    (toy / "data/README.md").touch()
    for name in "pqrs":
        (toy / "data" / name).touch()
    with pytest.raises(DataError, match=r"reads data/t, which does not exist; data/README.md says"):
        run(toy)


def test_models_to_start_from(toy: Path) -> None:
    reading(toy, "data/start/last")
    with pytest.raises(DataError, match="`vlfoundry import SOURCE data/start/last` makes it"):
        run(toy, "score")


def test_what_dvc_keeps(toy: Path) -> None:
    reading(toy, "rows.bin")
    (toy / "rows.bin").write_text("rows")
    sh(toy, sys.executable, "-m", "dvc", "add", "--quiet", "rows.bin")
    (toy / "rows.bin").unlink()
    with pytest.raises(DataError, match=r"score reads rows\.bin, .*; `dvc pull` gets what"):
        run(toy)
