"""A fresh toy checkout for each test, and one Prefect server for all flow tests."""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.toy import make_toy, reproduce, sh


@pytest.fixture(scope="session")
def toy_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy checkout, made once."""
    return make_toy(tmp_path_factory.mktemp("template") / "toy")


@pytest.fixture
def toy(toy_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of the toy checkout, with this interpreter's programs on the PATH."""
    programs = str(Path(sys.prefix) / "bin")
    monkeypatch.setenv("PATH", programs + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    root = tmp_path / "toy"
    sh(tmp_path, "git", "clone", "--quiet", str(toy_template), str(root))
    return root


@pytest.fixture(scope="session")
def trained_template(toy_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with trained models, made once."""
    root = tmp_path_factory.mktemp("trained") / "toy"
    shutil.copytree(toy_template, root)
    reproduce(root)
    return root


@pytest.fixture
def trained(trained_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy with trained models, and no git identity anywhere."""
    toy = Path(shutil.copytree(trained_template, tmp_path / "toy"))
    nowhere = toy / "work" / "home"
    nowhere.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HOME", str(nowhere))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.chdir(toy)
    return toy


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment variable that all processes of this test inherit."""
    value = f"vlfoundry-test-{uuid.uuid4().hex}"
    monkeypatch.setenv("VLFOUNDRY_TEST_MARK", value)
    return value


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Our own embedded server, for the whole session; its URL is in the environment."""
    from flows.server import prefect_environment, server

    root = tmp_path_factory.mktemp("server")
    added = prefect_environment(root)
    before = {name: os.environ.get(name) for name in (*added, "PREFECT_API_URL")}
    os.environ.update(added)
    with server(root) as running:
        os.environ["PREFECT_API_URL"] = running.url
        running.wait()
        yield running.url
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
