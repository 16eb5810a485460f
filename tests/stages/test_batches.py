"""Workers and packing are a matter of the place: they change how fast a stage learns, not what."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_project import PARAMS, artifacts, run_stage, write_params

pytestmark = pytest.mark.slow

MADE = "artifacts/sft/simple"
TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
PLAIN = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]


@pytest.fixture
def again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train `sft simple` again under a launcher profile; returns the project's folder."""

    def run(profile: str, prepare: Callable[[Path], None] = lambda root: None) -> Path:
        root = tmp_path / "again"
        shutil.copytree(trained, root, ignore=shutil.ignore_patterns("work"), symlinks=True)
        shutil.rmtree(root / MADE)
        prepare(root)
        (tmp_path / "place.yaml").write_text(profile)
        monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(tmp_path / "place.yaml"))
        run_stage(root, "sft", "variant=simple")
        return root

    return run


def steps(root: Path) -> list[dict[str, float]]:
    return json.loads((root / MADE / "history.json").read_text("utf-8"))["steps"]


def test_workers_change_no_bit(trained: Path, again) -> None:
    assert artifacts(again("workers: 2\n"), "sft/simple") == artifacts(trained, "sft/simple")


def test_packed_samples_are_learnt_as_padded_ones_are(trained: Path, again) -> None:
    root = again("ranks: 1\nworkers: 1\npacking: {max_tokens: 120, max_tiles: 4}\n")
    for packed, padded in zip(steps(root), steps(trained), strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


def test_a_sample_that_fits_no_pack_is_refused(trained: Path, again) -> None:
    with pytest.raises(AssertionError, match=r"sample \d+ of the step has \d+ tokens and 1 tiles"):
        again("packing: {max_tokens: 8}\n")


@pytest.fixture
def with_chat_file(again, tmp_path: Path):
    """As `again`, with a chat file of wide and small pictures, and of text alone, in the mix."""

    def run(profile: str) -> list[dict[str, float]]:
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        return steps(again(profile, prepare))

    def prepare(root: Path) -> None:
        chat = root / "data/chat"
        chat.mkdir(parents=True, exist_ok=True)
        for name, width in (("wide.png", 96), ("small.png", 20)):
            Image.fromarray(np.full((32, width, 3), width, np.uint8)).save(chat / name)
        lines = [
            {"image": "wide.png", "conversations": TALK + PLAIN},
            {"image": "small.png", "conversations": TALK[:1] + PLAIN[1:]},
            {"conversations": PLAIN},
        ]
        (chat / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources = {"scenes": {"weight": 1.0}, "mine": {"weight": 1.0}}
        write_params(root, PARAMS | {"sft": PARAMS["sft"] | {"sources": sources}})

    return run


def test_packed_conversations_of_several_tiles_are_learnt_as_padded_ones_are(
    trained: Path, with_chat_file
) -> None:
    rows = with_chat_file("ranks: 1\n")
    assert [row["loss"] for row in rows] != [row["loss"] for row in steps(trained)]
    profile = "ranks: 2\nworkers: 1\npacking: {max_tokens: 200, max_tiles: 12}\n"
    for packed, padded in zip(with_chat_file(profile), rows, strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


def test_groups_are_the_same_numbers_on_every_rank_and_those_without_stand_alone() -> None:
    from vlfoundry.stages.generative import groups

    metas = [{"concept": c} for c in ("sun", "cat", "sun")] + [{}, {"concept": ""}, {}]
    positions = [(0, 3), (0, 1), (1, 9), (0, 5), (0, 6), (1, 5)]
    numbers = groups(metas, "concept", positions).tolist()
    assert numbers[0] == numbers[2]
    assert numbers[3] == numbers[5]  # one picture, in another epoch
    assert len(set(numbers)) == 4
    assert groups(metas[2:3], "concept", [(7, 7)]).tolist() == numbers[2:3]
    assert groups(metas[:1], "caption", [(0, 3)]).tolist() != numbers[:1]
