"""A fresh toy checkout for each test, and one Prefect server for all flow tests."""

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.toy_project import make_toy, reproduce, sh


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
def session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Our own embedded server, for the whole session: the settings of Prefect that lead to it."""
    from vlfoundry.flows.server import prefect_environment, server

    root = tmp_path_factory.mktemp("server")
    settings = prefect_environment(root)
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            running = stack.enter_context(server(root))
        running.wait()
        yield settings | {"PREFECT_API_URL": running.url}


@pytest.fixture
def prefect_server(session_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of that server, which is in the environment of this test and of no other."""
    for name, value in session_server.items():
        monkeypatch.setenv(name, value)
    return session_server["PREFECT_API_URL"]
