"""The package as it is installed: one name, all of its files, none of anybody else's."""

import ast
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDERS = ("eval", "flows", "infra", "models", "stages")
BUILT_FROM = (*FOLDERS, "vlfoundry", "data", "profiles", "LICENSE", "README.md", "pyproject.toml",
              "params.yaml", "dvc.yaml", "MANIFEST.in")  # fmt: skip
JUNK = (
    "data/mine.parquet", "data/start/last/config.json", "data/start/last/weights.yaml",
    "data/chat/mine.jsonl", "data/chat/mine.yaml", "profiles/._base.yaml", "flows/left.pyc",
    "flows/__pycache__/x.py", "infra/launch/profiles/.#local.yaml", "models/notes.txt",
    "eval/key.json",
    "tests/test_mine.py",
)  # fmt: skip
"""what may lie in a checkout in which somebody works"""
THROUGH = {
    "configobj": "dvc", "voluptuous": "dvc", "datasets": "evaluate",
    "httpx": "prefect", "pydantic": "prefect", "triton": "torch",
}  # fmt: skip
"""distribution that is imported for the types of another one, which brings it along"""
EXTRAS = {"tensorboard", "dvclive", "transformer-engine"}
"""those of extras that are imported where they are asked for"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is built from, as git has it, and in a working tree's company."""
    place = tmp_path_factory.mktemp("tree")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *BUILT_FROM],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listing.split("\0")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
    for name in JUNK:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    return place


def build(tree: Path, out: Path, *command: str) -> Path:
    """The one file that setuptools builds of a tree; nothing is written beside `out`."""
    code = "from setuptools import setup; setup()"
    words = ["egg_info", "--egg-base", out, "build", "--build-base", out / "build", *command]
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", code, "-q", *map(str, words), "--dist-dir", str(out / "dist")],
        cwd=tree, check=True, capture_output=True,
    )  # fmt: skip
    (made,) = (out / "dist").iterdir()
    return made


def build_wheel(tree: Path, out: Path) -> Path:
    return build(tree, out, "bdist_wheel", "--bdist-dir", str(out / "bdist"))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is unpacked, as in site-packages."""
    place = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(place)
    return place


def packed(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheel_holds_what_git_has_of_the_package(wheel: Path) -> None:
    names = packed(wheel)
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ours = {f"vlfoundry/{name}" for name in listing.split("\0") if name}
    assert len(ours) > 200
    own = {"vlfoundry/__init__.py", "vlfoundry/__main__.py", "vlfoundry/api.py"}
    own |= {"vlfoundry/py.typed"}
    template = {name for name in names if name.startswith("vlfoundry/template/")}
    assert names - template == ours | own
    data = {name for name in template if name.startswith("vlfoundry/template/data/")}
    rest = {"vlfoundry/template/params.yaml", "vlfoundry/template/dvc.yaml"}
    profiles = {f"vlfoundry/template/profiles/{p.name}" for p in (ROOT / "profiles").glob("*.yaml")}
    assert template == data | rest | profiles
    known = subprocess.run(
        ["git", "ls-files", "-z", "data"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert data == {f"vlfoundry/template/{name}" for name in known.split("\0") if name}


def test_an_sdist_gives_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build(tree, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "from", filter="data")
    (place,) = (tmp_path / "from").iterdir()
    assert not (place / "tests").exists()
    again = build_wheel(place, tmp_path / "again")
    one, other = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert packed(wheel) == packed(again)
    assert [name for name in packed(wheel) if one.read(name) != other.read(name)] == []


def test_its_licences_are_named_and_there(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    said = email.message_from_bytes(archive.read(metadata))
    assert said["License-Expression"].split(" AND ") == [
        "Apache-2.0", "MIT", "CC-BY-4.0", "Unicode-3.0",
    ]  # fmt: skip
    texts = {Path(name).stem for name in said.get_all("License-File", []) if name != "LICENSE"}
    assert texts == {"Apache-2.0", "MIT", "CC-BY-4.0", "Unicode-3.0"}


def test_it_runs_where_there_is_no_checkout(installed: Path, tmp_path: Path) -> None:
    """Whatever modules read beside themselves, and a project, which Python reads first."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vlfoundry.flows.cli import app\n"
        "app(['new', 'team', '--from', 'hour'], standalone_mode=False)\n"
        "from vlfoundry.eval.report.page import render\n"
        "render(Path('team'), Path('page.html'))\n"
        "from vlfoundry.infra.launch.profile import local_profile\n"
        "assert local_profile(Path('team')).ranks == 2\n"
        "from vlfoundry.infra.data.synthetic.scenes import scene_languages\n"
        "assert 'ar' in scene_languages()\n"
        "from vlfoundry.eval.metrics import METRICS, compute\n"
        "from vlfoundry.flows.recipes import recipes\n"
        "assert 'internvl-c' in recipes(Path('team'))\n"
        "files = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'vlfoundry']\n"
        "assert len(files) > 50, files\n"
        "site = sys.argv[1]\n"
        "assert [file for file in files if not file.startswith(site)] == []\n"
        "assert not [path for path in sys.path if path == sys.argv[2]]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-P", str(script), str(installed), str(ROOT)]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    dry = subprocess.run(
        [sys.executable, "-m", "vlfoundry.stages.contrastive", "--dry-run"],
        cwd=tmp_path / "team", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert '"steps":2000' in dry.stdout.replace(" ", ""), dry.stdout + dry.stderr


def test_dependencies_cover_every_import(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    said = email.message_from_bytes(archive.read(metadata))
    wanted = [Requirement(line) for line in said.get_all("Requires-Dist", [])]
    core = {canonicalize_name(r.name) for r in wanted if "extra" not in str(r.marker)}
    extras = {canonicalize_name(r.name) for r in wanted} - core
    assert extras >= EXTRAS
    owners = importlib.metadata.packages_distributions()
    found = {"transformer_engine": {"transformer-engine"}}
    for name in packed(wheel):
        if name.endswith(".py"):
            for top in _imported(archive.read(name)):
                found.setdefault(top, {canonicalize_name(o) for o in owners.get(top, [top])})
    strange = {top: dists for top, dists in found.items() if not dists & (core | EXTRAS)}
    assert {dist for dists in strange.values() for dist in dists} == set(THROUGH)
    for name, parent in THROUGH.items():
        brought = map(Requirement, importlib.metadata.requires(parent) or [])
        assert parent in core
        assert name in {canonicalize_name(r.name) for r in brought}, (name, parent)


def _imported(source: bytes) -> set[str]:
    """Names of other people's packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return {n for n in names if n != "vlfoundry" and n not in sys.stdlib_module_names}
