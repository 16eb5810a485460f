"""Run keys change with what a result depends on, and with nothing else."""

from pathlib import Path
from typing import Any

import pytest

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.runkey import run_key


def test_the_key_depends_on_the_stage_its_parameters_its_inputs_and_its_code() -> None:
    def key(stage: str = "one", lr: float = 0.1, data: str = "d1", **code: Any) -> str:
        return run_key(stage, {"lr": lr}, {"data": data}, {"code": "c1"} | code)

    first = key()
    assert key() == first
    others = [
        key(stage="two"), key(lr=0.2), key(data="d2"), key(code="c2"),
        key(libraries={"torch": "2.11.0"}), key(libraries={"torch": "2.12.0"}),
    ]  # fmt: skip
    assert len({first, *others}) == 7


def test_a_folder_s_fingerprint_sees_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = fingerprint(folder)
    (folder / "a").rename(folder / "b")
    assert fingerprint(folder) != first
    with pytest.raises(DataError, match="does not exist"):
        fingerprint(tmp_path / "nothing")
