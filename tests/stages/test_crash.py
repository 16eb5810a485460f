"""Each of the three objectives, killed with -9 at a random moment, ends with the same bytes."""

import shutil
from pathlib import Path

import pytest

from accept.crash import Target, besiege
from tests.support.tiny_project import artifacts, start_fork

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "variant"), [("contrastive", ""), ("generative", ""), ("sft", "simple")]
)
def test_a_kill_does_not_change_a_bit(
    trained: Path, tmp_path: Path, stage: str, variant: str
) -> None:
    """`make accept SUBJECT=engine` kills 25 times."""
    target = Target(
        root=shutil.copytree(trained, tmp_path / "project", symlinks=True),
        stage=stage, variant=variant, start=start_fork,
    )  # fmt: skip
    target.clear()
    siege = besiege(target, kills=1, seed=sum(map(ord, stage)))
    assert len(siege.kills) == 1
    assert siege.same, siege
    assert artifacts(target.root, target.made) == artifacts(trained, target.made)
