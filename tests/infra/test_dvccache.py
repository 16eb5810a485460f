"""Where DVC's cache is, and what of DVC's settings another checkout gets."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vlfoundry.infra.core.dvccache import cache_folder, share_settings
from vlfoundry.infra.core.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two checkouts, and no settings of the user who runs the tests."""
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("DVC_SYSTEM_CONFIG_DIR", str(tmp_path / "machine"))
    for name in ("first", "second", "user", "machine"):
        (tmp_path / name / ".dvc").mkdir(parents=True)
    return tmp_path / "first", tmp_path / "second"


def dvc(place: Path, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=place, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("whose", ["first/.dvc/config", "user/config", "machine/config"])
@pytest.mark.parametrize("name", ["../far, off", "~/it", "/srv/it"])
def test_the_cache_is_where_dvc_has_it(
    places: tuple[Path, Path], whose: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = places[0]
    monkeypatch.setenv("HOME", str(root.parent / "home"))
    settings = root.parent / whose
    settings.write_text(f'[cache]\n    dir = "{name}"\n[core]\n    no_scm = true\n')
    assert cache_folder(root) == Path(dvc(root, "cache", "dir"))
    share_settings(root, places[1])
    assert Path(dvc(places[1], "cache", "dir")) == cache_folder(root)


def test_the_cache_of_a_checkout_that_says_nothing(places: tuple[Path, Path]) -> None:
    assert cache_folder(places[0]) == places[0] / ".dvc" / "cache"


def test_another_checkout_reaches_the_same_remotes(places: tuple[Path, Path]) -> None:
    first, second = places
    for place in places:
        (place / ".dvc/config").write_text(
            "[core]\n    no_scm = true\n['remote \"far\"']\n    url = s3://bucket/a\n"
            "['remote \"near\"']\n    url = ../../disk\n"
        )
    (first / ".dvc/config.local").write_text(
        '[\'remote "far"\']\n    secret_access_key = "K, #\'1"\n    credentialpath = keys\n'
    )
    share_settings(first, second)
    assert stat.S_IMODE((second / ".dvc/config.local").stat().st_mode) == 0o600
    assert dvc(second, "remote", "list").split() == [
        "far", "s3://bucket/a", "near", str(first.parent / "disk"),
    ]  # fmt: skip
    assert dvc(second, "config", "remote.far.secret_access_key") == "K, #'1"
    assert dvc(second, "config", "remote.far.credentialpath") == str(first / ".dvc" / "keys")


@pytest.mark.parametrize(
    "text",
    [
        "[cache\n",
        "[cache]\n    dri = x\n",
        "[cache]\n    dir = /a, b\n",
        "['remote \"r\"']\n    url = s3://b\n    secret_access_key = a%(b)sc\n",
    ],
)
def test_settings_that_dvc_refuses(places: tuple[Path, Path], text: str) -> None:
    (places[0] / ".dvc/config").write_text(text)
    with pytest.raises(ConfigError, match="DVC cannot read its settings"):
        cache_folder(places[0])
