"""Recorded conversations: they pass, and a mask that is off by one does not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlfoundry.eval.parity import conversations
from vlfoundry.eval.parity.check import Check
from vlfoundry.eval.parity.conversations import check_conversations, is_conversations

FOLDER = Path(__file__).parent / "golden" / "conversations"


@pytest.fixture
def copied(tmp_path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "E")
    return tmp_path / "E"


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def test_every_recorded_conversation_agrees():
    checks = check_conversations(FOLDER)

    assert is_conversations(FOLDER)
    assert failed(checks) == []
    assert len({check.name for check in checks}) == len(checks)
    cases = json.loads((FOLDER / "conversations.json").read_text("utf-8"))
    assert sum(check.name.endswith(": labels") for check in checks) == len(cases)


def test_a_recorded_defect_says_so():
    notes = {c.name: c.note for c in check_conversations(FOLDER) if c.name.endswith(": labels")}

    defects = [name for name, note in notes.items() if "recorded defect" in note]
    assert defects == ["internvl_zh/images_in_two_turns/llama_bos: labels"]
    assert "tokenization mismatch" in notes[defects[0]]


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_that_is_off_by_one_fails(monkeypatch, shift):
    right = conversations.row

    def off_by_one(*args, **kwargs):
        got = right(*args, **kwargs)
        learnt = np.roll(got.labels != -100, shift)
        return conversations.replace(got, labels=np.where(learnt, got.ids, -100))

    monkeypatch.setattr(conversations, "row", off_by_one)
    wrong = failed(check_conversations(FOLDER))

    labels = [name for name in wrong if name.endswith(": labels")]
    cases = json.loads((FOLDER / "conversations.json").read_text("utf-8"))
    assert len(labels) == sum(any(label != -100 for label in case["labels"]) for case in cases)
    assert not [name for name in wrong if name.endswith(": input_ids")]


def test_a_changed_separator_fails(copied):
    edit(
        copied / "templates.json", lambda recorded: recorded["Hermes-2"].update(sep="<|im_end|>\n")
    )

    assert failed(check_conversations(copied)) == ["template Hermes-2"]


def test_a_template_we_do_not_have_fails_with_the_names_there_are(copied):
    edit(copied / "conversations.json", lambda cases: cases[0].update(template="robin"))

    checks = [check for check in check_conversations(copied) if not check.passed]

    assert [check.name for check in checks] == ["robin/images_in_two_turns/llama_bos"]
    assert "vicuna_v1" in checks[0].note
