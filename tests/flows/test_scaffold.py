"""What `vlfoundry new suite|launcher|family NAME` writes is sound: lint, contracts, its test."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlfoundry.flows.scaffold import KINDS, write
from vlfoundry.infra.core.errors import ConfigError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COPIED = ("eval", "flows", "infra", "models", "stages", "vlfoundry", "tests", "pyproject.toml")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scaffold") / "checkout"
    root.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        ignored = {"ignore": shutil.ignore_patterns("golden", "cases", "__pycache__")}
        options = ignored | {"symlinks": True} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, root / name, **options)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_begun_is_registered_and_sound(kind: str, checkout: Path) -> None:
    lines = list(write(kind, "brand_new", checkout))
    files = [checkout / line.removeprefix("wrote ") for line in lines[:2]]
    assert all(file.is_file() for file in files)
    lint = [sys.executable, "-m", "ruff"]
    subprocess.run([*lint, "check", *files], cwd=checkout, check=True)
    subprocess.run([*lint, "format", "--check", *files], cwd=checkout, check=True)
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", files[1]]
    ended = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=False)
    if kind == "launcher":  # its function is still to be written
        assert "NotImplementedError" in ended.stdout
    else:
        assert ended.returncode == 0, ended.stdout
    with pytest.raises(ConfigError, match=r"brand_new.py is there already; choose another name"):
        list(write(kind, "brand_new", checkout))


@pytest.mark.parametrize("name", ["my-suite", "3d", "class", "Mine", ""])
def test_a_name_that_is_no_module_is_refused(name: str, checkout: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a suite; expected lower-case letters"):
        list(write("suite", name, checkout))


def test_only_a_checkout_has_a_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a checkout of VLFoundry, in which a family is"):
        list(write("family", "mine", tmp_path))
