"""Each of the three objectives, killed with -9 at random moments, ends with the same bytes."""

import shutil
from pathlib import Path

import pytest

from accept.crash import Target, besiege
from tests.tiny import artifacts, start_fork


@pytest.mark.parametrize(
    ("stage", "variant", "kills"),
    [("contrastive", "", 2), ("generative", "", 1), ("sft", "simple", 1)],
)
def test_kills_do_not_change_a_bit(
    trained: Path, tmp_path: Path, stage: str, variant: str, kills: int
) -> None:
    """`make accept ISSUE=4` kills 25 times."""
    target = Target(
        root=shutil.copytree(trained, tmp_path / "project"),
        stage=stage, variant=variant, start=start_fork,
    )  # fmt: skip
    target.clear()
    siege = besiege(target, kills=kills, seed=sum(map(ord, stage)))
    assert len(siege.kills) == kills
    assert siege.same, siege
    assert artifacts(target.root, target.made) == artifacts(trained, target.made)
