"""The code of a step: what it reaches, what it counts as, what the step `code` writes of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlfoundry.eval.metrics import METRICS
from vlfoundry.eval.suites import suites
from vlfoundry.infra.core import code
from vlfoundry.infra.core.code import Code, closure, read_code, refresh, step_file, write_stamp
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.models.families import families

SOURCES = {
    "__init__.py": "",
    "stages/__init__.py": "",
    "infra/__init__.py": "",
    "infra/io.py": "import os\n",
    "infra/lazy.py": "X = 1\n",
    "infra/lazy.json": '{"side": 37}',
    "infra/other.py": "X = 2\n",
    "infra/core/__init__.py": "",
    "infra/core/members.py": "def members(package, attribute): ...\n",
    "kinds/__init__.py": "from vlfoundry.infra.core.members import members\n",
    "kinds/red.py": "KIND = 1\n",
    "kinds/blue/__init__.py": "KIND = 2\n",
    "kinds/blue/blue.py": "SHADE = 1\n",
    "kinds/blue/other.py": "SHADE = 2\n",
    "stages/three.py": "from vlfoundry.kinds import KINDS\n",
    "infra/core/progress.py": "from vlfoundry.infra import other\n",
    "stages/one.py": (
        "from vlfoundry.infra import io\nfrom vlfoundry.infra.core.progress import Progress\n\n\n"
        "def run():\n    import vlfoundry.infra.lazy\n"
    ),
    "stages/two.py": "from vlfoundry.infra.other import X\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout: it has a package of its own."""
    for name, text in SOURCES.items():
        path = tmp_path / "vlfoundry" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def identity(project: Path, step: str = "one") -> str:
    return read_code([step], project)[step].identity


def edit(project: Path, name: str, text: str) -> None:
    (project / "vlfoundry" / name).write_text(text)


def declare(project: Path, **facts: str) -> None:
    entry = {"because": "it is", "by": "Ada", "on": "'2026-11-30'", **facts}
    lines = [f"  {key}: {value}" for key, value in entry.items()]
    with (project / code.ACCEPTED).open("a") as file:
        file.write("\n".join(["-", *lines]) + "\n")


def test_the_closure_follows_lazy_imports_and_no_neutral_module(project: Path) -> None:
    assert list(closure("vlfoundry.stages.one", project / "vlfoundry")) == [
        "vlfoundry",
        "vlfoundry.infra",
        "vlfoundry.infra.io",
        "vlfoundry.infra.lazy",
        "vlfoundry.infra.lazy:lazy.json",
        "vlfoundry.stages",
        "vlfoundry.stages.one",
    ]


def test_a_registry_reaches_the_modules_of_its_folder(project: Path) -> None:
    found = closure("vlfoundry.stages.three", project / "vlfoundry")
    assert [name.removeprefix("vlfoundry.kinds.") for name in found if ".kinds." in name] == [
        "blue", "blue.blue", "red",
    ]  # fmt: skip
    first = identity(project, "three")
    edit(project, "kinds/green.py", "KIND = 3\n")
    assert identity(project, "three") != first


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        ("evaluate", [f"eval.metrics.{name}.{name}" for name in METRICS]),
        ("evaluate", [f"eval.suites.{name}" for name in suites()]),
        ("contrastive", [f"models.families.{name}" for name in families()]),
        ("contrastive", ["infra.launch.launchers.fork"]),
    ],
)
def test_what_no_import_names_is_part_of_the_code(step: str, wanted: list[str]) -> None:
    found = closure(f"vlfoundry.stages.{step}")
    assert wanted
    assert [name for name in wanted if f"vlfoundry.{name}" not in found] == []


def test_code_changes_with_the_meaning_of_what_is_reached(project: Path) -> None:
    first = identity(project)
    edit(project, "infra/io.py", '"""Reads."""\n\nimport os  # twice\n')
    edit(project, "infra/other.py", "X = 3\n")
    edit(project, "infra/core/progress.py", "X = 3\n")
    edit(project, "infra/lazy.json", '{\n  "side": 37\n}\n')
    assert identity(project) == first
    edit(project, "infra/lazy.json", '{"side": 38}')
    second = identity(project)
    edit(project, "infra/lazy.py", "X = 4\n")
    assert len({first, second, identity(project)}) == 3


def test_what_sources_mean_is_remembered(project: Path, monkeypatch) -> None:
    first = identity(project)

    def read_again(_text: str) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(code, "read_source", read_again)
        assert identity(project) == first
        edit(project, "infra/io.py", "import sys\n")
        with pytest.raises(AssertionError):
            identity(project)
    (project / code.CACHE).write_text('{"by": ')
    edit(project, "infra/io.py", SOURCES["infra/io.py"])
    assert identity(project) == first


def test_a_source_that_is_no_python_is_named(project: Path) -> None:
    edit(project, "infra/io.py", "import\n")
    with pytest.raises(DataError, match=r"infra/io.py cannot be read as Python.*line 1"):
        identity(project)


def test_the_files_of_all_steps_change_with_their_code_alone(project: Path) -> None:
    refresh(project)
    paths = [project / step_file(step) for step in ("one", "two")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    refresh(project)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    edit(project, "stages/two.py", "X = 5\n")
    refresh(project)
    now = [path.read_bytes() for path in paths]
    assert now[0] == before[0][0]
    assert now[1] != before[1][0]
    assert step_file("two@big") == step_file("two")


def test_declared_harmless_it_counts_as_the_earlier_one(project: Path) -> None:
    first = identity(project)
    refresh(project)
    stamp = (project / step_file("one")).read_bytes()
    edit(project, "infra/io.py", "import sys\n\nsys.path\n")
    second = identity(project)
    declare(project, step="one", code=second, counts_as=first)
    now = read_code(["one"], project)["one"]
    assert (now.identity, now.counts_as) == (second, first)
    assert now.facts["accepted"]["because"] == "it is"
    refresh(project)
    assert (project / step_file("one")).read_bytes() == stamp
    edit(project, "infra/io.py", "import sys\n\nsys.argv\n")
    third = read_code(["one"], project)["one"]
    assert third.counts_as == third.identity  # nobody has said anything of that


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {step: one, cod: x}", r"accepted.yaml\[0\]: unknown key 'cod'"),
        ("step: one", "expected a list of declarations"),
        ("- {step: one, code: x}", "'counts_as' is missing"),
    ],
)
def test_a_wrong_declaration_is_refused(project: Path, text: str, message: str) -> None:
    (project / code.ACCEPTED).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_code(["one"], project)


def test_versions_of_libraries_count_where_params_yaml_says_so(project: Path, monkeypatch) -> None:
    def stamp(torch: str) -> dict:
        monkeypatch.setattr(code, "versions", lambda: {"torch": torch, "numpy": "2.4.1"})
        found: Code = read_code(["one"], project)["one"]
        assert found.facts["libraries"] == {"torch": torch, "numpy": "2.4.1"}
        return found.stamp

    assert stamp("2.11.0") == stamp("2.12.0")
    (project / "params.yaml").write_text("code: {strict_versions: true}\n")
    assert stamp("2.11.0") != stamp("2.12.0")
    (project / "params.yaml").write_text("code: {strict: true}\n")
    with pytest.raises(ConfigError, match="code: unknown key 'strict'"):
        stamp("2.11.0")


def test_installed_libraries_are_named() -> None:
    import torch

    found = code.versions()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert set(found) <= set(code.LIBRARIES)


def test_the_step_takes_less_than_a_second(project: Path) -> None:
    """With what sources mean remembered; without, it may take two."""
    command = [sys.executable, "-m", "vlfoundry.infra.core.code"]
    place = Path(code.__file__).parents[3]
    (project / "vlfoundry").rename(project / "away")
    (project / "dvc.yaml").write_text("stages: {}\n")
    for _ in range(2):
        began = time.monotonic()
        subprocess.run(command, cwd=project, check=True, env={"PYTHONPATH": str(place)})
        took = time.monotonic() - began
    assert took < 1
    written = sorted(path.stem for path in (project / code.STEP_FILES).iterdir())
    assert written == code.steps()
    assert len(json.loads((project / step_file("gate")).read_text())["code"]) == 64


def test_a_stamp_is_written_once(tmp_path: Path) -> None:
    assert write_stamp(tmp_path, "sft@full", {"code": "a"})
    assert not write_stamp(tmp_path, "sft@simple", {"code": "a"})
    assert write_stamp(tmp_path, "sft", {"code": "b"})
