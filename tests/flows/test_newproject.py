"""`vlfoundry new`: a project that has all that a run needs, or nothing at all."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cpu import least_cpu_s
from tests.support.toy_project import sh
from vlfoundry.flows.newproject import NewProject, data_files, make_project, with_comments
from vlfoundry.flows.recipes import TEMPLATE, profiles, with_profile
from vlfoundry.flows.workspace import Variation, workspace
from vlfoundry.infra.core.config import build, load_params
from vlfoundry.infra.core.dvccache import read_settings
from vlfoundry.infra.core.errors import ConfigError, UserError
from vlfoundry.infra.core.project import find_root
from vlfoundry.models.internvl.config import InternVLConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOP = {
    ".dvc", ".dvcignore", ".git", ".gitignore", "README.md", "data", "dvc.yaml", "launchers",
    "params.yaml", "prefect.yaml", "profiles",
}  # fmt: skip


@pytest.fixture
def somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose git knows a name, and in which *.parquet is ignored everywhere."""
    home = tmp_path / "home"
    (home / ".config/git").mkdir(parents=True)
    (home / ".config/git/ignore").write_text("*.parquet\n.dvc\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("GIT_CONFIG_GLOBAL", raising=False)
    sh(tmp_path, "git", "config", "--global", "user.name", "Ada")
    sh(tmp_path, "git", "config", "--global", "user.email", "ada@localhost")
    return home


@pytest.fixture
def nobody(somebody: Path) -> Path:
    """A home whose git knows no name, and ignores nothing."""
    (somebody / ".gitconfig").unlink()
    (somebody / ".config/git/ignore").unlink()
    return somebody


def make(place: Path, **options: object) -> list[str]:
    return list(make_project(NewProject(place=place, **options)))  # type: ignore[arg-type]


def test_a_project_has_what_a_run_needs(somebody: Path, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "my team é"
    said = make(place)
    assert {path.name for path in place.iterdir()} == TOP
    assert find_root(place / "data") == place
    assert said[-1] == f"next: cd {shlex.quote(str(place))} && vlfoundry run"
    assert "14 MB" in said[1]
    for path in ("params.yaml", "data/README.md", "data/LICENSES/MIT.txt", *data_files()):
        assert (place / path).read_bytes() == (TEMPLATE / path).read_bytes(), path
    assert len(data_files()) == 8
    core = read_settings(place)["core"]
    assert core == read_settings(ROOT)["core"]
    assert core["autostage"] is False
    readme = (place / "README.md").read_text()
    assert readme.startswith("# my team é\n")
    assert [name for name in TOP if not name.startswith(".") and f"`{name}" not in readme] == [
        "README.md"
    ]
    assert len(readme.splitlines()) <= 40


def test_git_has_all_of_it_in_one_commit(somebody: Path, tmp_path: Path) -> None:
    place = tmp_path / "team"
    make(place)
    assert sh(place, "git", "log", "--format=%an %s") == "Ada A project of VLFoundry\n"
    assert sh(place, "git", "status", "--porcelain", "--ignored") == ""
    tracked = sh(place, "git", "ls-files").splitlines()
    assert {"data/noto.parquet", ".dvc/config", "data/start/.gitignore"} <= set(tracked)
    made = [p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()]
    assert sorted(tracked) == sorted(path for path in made if not path.startswith(".git/"))


def test_without_a_name_there_is_no_commit_and_a_workspace_all_the_same(
    nobody: Path, tmp_path: Path
) -> None:
    place = tmp_path / "team"
    said = make(place, data=False)
    assert any("git commit -m" in line for line in said)
    assert any("needs concepts.parquet, emojitwo.parquet" in line for line in said)
    assert subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True).returncode
    for path in data_files():
        (place / path).write_text("rows")
    (place / "data/notes.txt").touch()
    with workspace(place, Variation(overrides=("seed=3",))) as lock:
        assert load_params(lock.root / "params.yaml")["seed"] == 3
        assert (lock.root / "data/noto.parquet").read_text() == "rows"
        assert (lock.root / "dvc.yaml").read_bytes() == (place / "dvc.yaml").read_bytes()
        assert not (lock.root / "data/notes.txt").exists()


@pytest.mark.parametrize("profile", ["base", "hour", "internvl-c", "chat-v1.2-finetune"])
def test_a_profile_is_merged_into_the_parameters(
    somebody: Path, tmp_path: Path, profile: str
) -> None:
    make(tmp_path / "team", profile=profile, data=False)
    path = tmp_path / "team/params.yaml"
    written = load_params(path)
    merged = with_profile(load_params(TEMPLATE / "params.yaml"), TEMPLATE, profile)
    model = build(InternVLConfig, written.pop("model"), "model")
    assert model == build(InternVLConfig, merged.pop("model"), "model")
    assert written == merged
    text = path.read_text()
    assert f"The profile '{profile}' of VLFoundry" in text.splitlines()[0]
    assert "The default run" not in text
    assert "# training drawings that a class must have" in text
    # Of a model that is laid over the default's, no field that neither of them names.
    assert ("drop_path_shape" in text) == (profile not in ("base", "hour"))


def test_comments_stay_where_their_values_do() -> None:
    text = "a: 1 # one\nb: {c: 2, d: x} # two\nkeep: &k yes # three\nsame: *k\ne: [1, 2]\n"
    laid = with_comments(text, {"a": None, "b": {"d": "y", "f": 0.5}, "keep": "yes", "same": "yes"})
    assert laid == "a: null # one\nb: {d: y, f: 0.5} # two\nkeep: &k yes # three\nsame: *k\n"
    default = (TEMPLATE / "params.yaml").read_text()
    assert with_comments(default, load_params(TEMPLATE / "params.yaml")) == default


def test_an_empty_folder_and_one_in_another_repository_will_do(
    somebody: Path, tmp_path: Path
) -> None:
    outer = tmp_path / "outer"
    (outer / "team").mkdir(parents=True)
    sh(outer, "git", "init", "--quiet")
    assert f"lies in the git repository {outer}" in "\n".join(make(outer / "team", data=False))
    assert find_root(outer / "team") == outer / "team"
    assert sh(outer, "git", "status", "--porcelain") == "?? team/\n"


def test_what_cannot_be_a_project(
    somebody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    for name in "abcdefg":
        (tmp_path / "full" / name).touch()
    (tmp_path / "code/vlfoundry").mkdir(parents=True)
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for place, words in (
        ("full", "is not empty: it holds a, b, c, d, e and 2 more"),
        ("full/a", "is not a folder"),
        ("full/a/b", "is not a directory"),
        ("code", "holds 'vlfoundry', which no project may: .* Python would take that"),
        ("here/below", r"is where you are and cannot be replaced .*below/myteam"),
        ("/proc", "is not empty|is a mount point"),
    ):
        with pytest.raises(UserError, match=words):
            make(tmp_path / place)
    with pytest.raises(ConfigError, match=r"no profile 'huor': expected one of .*'hour'"):
        make(tmp_path / "new", profile="huor")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="git is not on the PATH"):
        make(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_kill_leaves_no_project(somebody: Path, tmp_path: Path) -> None:
    place = tmp_path / "team"
    code = (
        "import os, shutil, signal, sys; from pathlib import Path\n"
        "from vlfoundry.flows.newproject import *\n"
        "shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "list(make_project(NewProject(place=Path(sys.argv[1]))))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not place.exists()
    make(place)
    assert {path.name for path in place.iterdir()} == TOP


def test_an_error_leaves_nothing(
    somebody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device"):
        make(tmp_path / "team")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_the_command_takes_less_than_a_second(somebody: Path, tmp_path: Path) -> None:
    made: list[subprocess.CompletedProcess[str]] = []

    def new() -> None:
        command = [sys.executable, "-m", "vlfoundry", "new", f"team{len(made)}", "--no-data"]
        made.append(
            subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        )

    assert least_cpu_s(new, enough=1.0) < 1.0
    assert made[0].stdout.splitlines()[-1] == "next: cd team0 && vlfoundry run"
    assert not (tmp_path / "team0/data/noto.parquet").exists()
    guide = (tmp_path / "team0/data/README.md").read_text()
    assert [Path(path).name for path in data_files() if Path(path).name not in guide] == []


def test_the_tree_itself_has_no_other_profiles_than_it_ships() -> None:
    assert list(profiles(ROOT)) == list(profiles(TEMPLATE))
