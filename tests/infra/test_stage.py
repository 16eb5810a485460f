"""The command line that all stages share, and the folder that belongs to one run key."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlfoundry.infra.core import workfolder
from vlfoundry.infra.core.config import to_dict
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.stage import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    ORIGIN_FILE,
    Context,
    Stage,
    check_folders,
    main,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions:
    factor: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    seed: int
    toy: ToyOptions


def double(config: ToyConfig, context: Context) -> None:
    number = int(context.path("in.txt").read_text())
    if number < 0:
        raise DataError("in.txt: got a negative number, expected 0 or more")
    if number == 99:
        raise KeyboardInterrupt
    context.write_json("artifacts/toy/out.json", {"value": number * config.toy.factor})
    (context.work / "state").write_text("kept")


TOY = Stage(
    name="toy",
    config=ToyConfig,
    inputs=("in.txt",),
    outputs=("artifacts/toy/out.json",),
    run=double,
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlfoundry.infra.core.stage._leave_with_parent", lambda: None)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/toy.py").write_text("")
    (tmp_path / "params.yaml").write_text("seed: 1\ntoy: {factor: 3}\nother: 5\n")
    (tmp_path / "in.txt").write_text("7")
    return tmp_path


def test_a_stage_makes_its_output_its_lineage_and_its_record(project: Path) -> None:
    assert main(TOY, []) == 0
    assert json.loads((project / "artifacts/toy/out.json").read_text()) == {"value": 21}
    lineage = json.loads((project / "artifacts/toy/lineage.json").read_text())
    assert lineage["parameters"] == to_dict(ToyConfig(seed=1, toy=ToyOptions(factor=3)))
    assert list(lineage["inputs"]) == ["in.txt"]
    assert list(lineage["outputs"]) == ["artifacts/toy/out.json"]
    record = json.loads((only_state(project) / "record.json").read_text())
    assert record["run_key"] == lineage["run_key"]


def test_the_same_run_makes_the_same_bytes(project: Path) -> None:
    main(TOY, [])
    first = (project / "artifacts/toy/lineage.json").read_bytes()
    main(TOY, [])
    assert (project / "artifacts/toy/lineage.json").read_bytes() == first


def only_state(project: Path) -> Path:
    (found,) = workfolder.folders(project / "work/toy")
    return found


def now(project: Path) -> Path:
    found = workfolder.current(project, "toy")
    assert found
    return found


def test_state_survives_the_same_key_and_another_has_its_own(project: Path) -> None:
    main(TOY, [])
    main(TOY, [])
    first = only_state(project)
    assert first.name == lineage_of(project)["run_key"][:12]
    assert [path.name for path in (project / "work").iterdir()] == ["toy"]
    (first / "state").write_text("of the first run")
    main(TOY, ["toy.factor=4"])
    assert (first / "state").read_text() == "of the first run"
    assert (now(project) / "state").read_text() == "kept"
    assert len(workfolder.folders(project / "work/toy")) == 2


def test_no_run_deletes_the_state_of_another(project: Path, capsys: pytest.CaptureFixture) -> None:
    """Three changes one after another, and back to each: nothing is lost, each goes on."""
    for number, factor in enumerate((3, 4, 5, 6)):
        main(TOY, [f"toy.factor={factor}"])
        (now(project) / "note").write_text(f"of factor {factor}")
        said = capsys.readouterr().out
        assert (f"in {number} earlier run" in said) == (number > 0), said
    for factor in (5, 3, 4, 6):
        main(TOY, [f"toy.factor={factor}"])
        assert "it starts anew" not in capsys.readouterr().out
        assert (now(project) / "note").read_text() == f"of factor {factor}"
    assert len(workfolder.folders(project / "work/toy")) == 4


def test_a_folder_of_its_name_that_is_not_its_own_is_left_alone(project: Path, capsys) -> None:
    main(TOY, [])
    marker = now(project) / workfolder.KEY_FILE
    key = marker.read_text()
    marker.write_text(key[:12] + "f" * 52)
    assert main(TOY, []) == EXIT_USER_ERROR
    assert f"is that of {key[:12]}ffff" in capsys.readouterr().err
    marker.unlink()
    assert main(TOY, []) == EXIT_USER_ERROR
    assert "is marked as nobody's; move it away and run again" in capsys.readouterr().err
    assert (marker.parent / "state").read_text() == "kept"


def test_a_dry_run_writes_nothing(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project / "in.txt").unlink()
    assert main(TOY, ["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "in.txt  (does not exist yet)" in printed
    assert "writes artifacts/toy/out.json" in printed
    assert not (project / "artifacts").exists()
    assert not (project / "work").exists()


def test_a_user_s_mistake_is_one_line(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project / "in.txt").write_text("-1")
    assert main(TOY, []) == EXIT_USER_ERROR
    assert capsys.readouterr().err == ("toy: in.txt: got a negative number, expected 0 or more\n")
    assert main(TOY, ["toy.facto=1"]) == EXIT_USER_ERROR
    assert "did you mean 'factor'" in capsys.readouterr().err
    (project / "in.txt").unlink()
    assert main(TOY, []) == EXIT_USER_ERROR
    assert "`dvc repro toy` makes it" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project / "in.txt").write_text("99")
    assert main(TOY, []) == EXIT_INTERRUPTED
    assert "run it again to go on" in capsys.readouterr().out


def test_variants_fill_in_paths() -> None:
    stage = dataclasses.replace(
        TOY,
        inputs=("a/{variant}",),
        outputs=("b/{variant}/m",),
        variants=("x", "y"),
        variant_inputs={"y": ("extra",)},
    )
    bound = stage.bind("y")
    config = ToyConfig(seed=1, toy=ToyOptions())
    assert (bound.address, bound.inputs(config), bound.outputs, bound.lineage) == (
        "toy@y",
        ("a/y", "extra"),
        ("b/y/m",),
        "artifacts/toy/y/lineage.json",
    )
    with pytest.raises(ConfigError, match="expected variant=one of"):
        stage.bind("z")
    with pytest.raises(ConfigError, match="expected no variant"):
        TOY.bind("x")


# --- inputs that the config names


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartOptions:
    one: str = "artifacts/made"
    other: str = "artifacts/made"

    def __post_init__(self) -> None:
        check_folders("toy.start", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartConfig:
    seed: int
    toy: StartOptions


STARTING = dataclasses.replace(
    TOY,
    config=StartConfig,
    run=lambda config, context: context.write_json(
        "artifacts/toy/out.json", sorted(p.name for p in context.path(config.toy.one).iterdir())
    ),
    starts=lambda config, _variant: (config.toy.one, config.toy.other),
)


@pytest.fixture
def starting(project: Path) -> Path:
    (project / "params.yaml").write_text("seed: 1\ntoy: {one: data/start/a, other: data/start/a}\n")
    (project / "data/start/a").mkdir(parents=True)
    (project / "data/start/a/weights").write_text("first")
    return project


def lineage_of(project: Path) -> dict:
    return json.loads((project / "artifacts/toy/lineage.json").read_text())


def test_what_the_config_names_counts_as_an_input(starting: Path) -> None:
    assert main(STARTING, []) == 0
    first = lineage_of(starting)
    assert first["inputs"] == {
        "in.txt": fingerprint(starting / "in.txt"),
        "data/start/a": fingerprint(starting / "data/start/a"),
    }
    assert first["starts"] == {"data/start/a": None}
    earlier = now(starting)
    (earlier / "state").write_text("of the first run")
    assert main(STARTING, []) == 0
    assert lineage_of(starting) == first
    assert now(starting) == earlier  # resumed in place

    (starting / "data/start/a/weights").write_text("other")
    (starting / "data/start/a" / ORIGIN_FILE).write_text('{"ref": "toy@v0.1.0"}')
    assert main(STARTING, []) == 0
    second = lineage_of(starting)
    assert second["run_key"] != first["run_key"]
    assert second["starts"] == {"data/start/a": {"ref": "toy@v0.1.0"}}
    assert now(starting) != earlier


def test_a_folder_that_is_not_there(starting: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(STARTING, ["toy.other=data/start/b"]) == EXIT_USER_ERROR
    assert "`vlfoundry import SOURCE data/start/b` makes it" in capsys.readouterr().err
    assert main(STARTING, ["toy.other=artifacts/toy"]) == EXIT_USER_ERROR
    assert "toy makes artifacts/toy and cannot start from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/elsewhere/model", "expected a folder inside of the project"),
        ("../model", "expected a folder inside of the project"),
        ("..", "expected a folder inside of the project"),
        (".", "expected a folder inside of the project"),
        ("", "expected a folder inside of the project"),
        ("s3://bucket/model", "expected a folder inside of the project"),
        ("data/start/a/", "write it as 'data/start/a'"),
        ("data/x/../start/a", "write it as 'data/start/a'"),
    ],
)
def test_folders_are_inside_and_spelled_as_dvc_spells_them(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"toy\.start\.one is .*{message}"):
        StartOptions(one=path)
    assert StartOptions(one="..data/start").one == "..data/start"


def test_another_copy_is_waited_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Such as one that is yet saving though the run that wanted it was killed."""
    (project / ".dvc").mkdir()
    assert main(TOY, []) == 0
    path = project / ".dvc/tmp/stages/toy.lock"
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(float(sys.argv[2]))", str(path)]
    with subprocess.Popen([*command, "1.5"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        began = time.monotonic()
        assert main(TOY, []) == 0
        assert time.monotonic() - began > 1
    assert "toy: waiting for another copy to end" in capsys.readouterr().out
    monkeypatch.setattr("vlfoundry.infra.core.stage.COPY_PATIENCE_S", 0.2)
    with subprocess.Popen([*command, "5"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main(TOY, []) == EXIT_USER_ERROR
        other.kill()
    assert "another copy of toy runs here" in capsys.readouterr().err


def test_an_empty_work_folder_is_taken_as_it_is(project: Path) -> None:
    """It may be a mount point, which cannot be renamed."""
    (project / "work/toy").mkdir(parents=True)
    inode = (project / "work/toy").stat().st_ino
    main(TOY, [])
    assert (project / "work/toy").stat().st_ino == inode
    assert [path.name for path in (project / "work").iterdir()] == ["toy"]
