"""Each of the three objectives, killed with -9 at random moments, ends with the same bytes."""

import shutil
from pathlib import Path

import pytest

from accept.crash import Target, besiege
from tests.tiny import artifacts, start_fork

KILLS = 2


@pytest.mark.parametrize(
    ("stage", "variant"), [("contrastive", ""), ("generative", ""), ("sft", "simple")]
)
def test_kills_do_not_change_a_bit(trained: Path, tmp_path: Path, stage: str, variant: str) -> None:
    target = Target(
        root=shutil.copytree(trained, tmp_path / "project"),
        stage=stage, variant=variant, start=start_fork,
    )  # fmt: skip
    target.clear()
    siege = besiege(target, kills=KILLS, seed=sum(map(ord, stage)))
    assert len(siege.kills) == KILLS
    assert siege.same, siege
    assert artifacts(target.root, target.made) == artifacts(trained, target.made)
