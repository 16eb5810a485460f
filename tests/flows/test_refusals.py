"""What cannot be read or written is one line and exit code 2, before any work is done."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.small_disk import LIBC, MS_RDONLY, fill, small_disk
from tests.support.toy_project import processes_marked, sh, steer
from vlfoundry.flows.leftovers import clear_part_files
from vlfoundry.flows.plan import machine_of
from vlfoundry.infra.core.config import apply_overrides, load_params
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.launch.profile import ExecutionProfile, host_and_port, load_profile

pytestmark = pytest.mark.slow

RUN = [sys.executable, "-m", "vlfoundry.flows.cli"]
MS_REMOUNT, MS_BIND = 32, 4096


def vlfoundry(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *words], cwd=root, capture_output=True, text=True, check=False, timeout=180,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )  # fmt: skip


def refused(ended: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("vlfoundry: "), ended.stderr
    for part in parts:
        assert part in last


@pytest.mark.parametrize(
    "text",
    ["[[", "!!x", "{a", "'", "!!python/object/apply:os.system [ls]", "2026-13-45", "&a [*a]", "*b",
     "!!binary aGk=", "!!set {a}", "2026-01-01", "a: b: c", "@x", "`x", "\x01", "[" * 3000],
)  # fmt: skip
def test_values_that_are_not_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^seed=") as caught:
        apply_overrides({"seed": 1}, [f"seed={text}"])
    assert "\n" not in str(caught.value)
    path = tmp_path / "params.yaml"
    path.write_text(f"other: 1\nseed: {text}\n")
    with pytest.raises(ConfigError, match=rf"^{path} ") as caught:
        load_params(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_yaml(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy / "params.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(ConfigError, match=r"params\.yaml is not UTF-8: .* at byte 6"):
        load_params(toy / "params.yaml")
    (toy / "params.yaml").write_text("seed: 1\n  train: [\n")
    refused(vlfoundry(toy, "run", "--set", "seed=3"), "params.yaml", "line 2")
    refused(vlfoundry(toy, "run"), "params.yaml")
    refused(vlfoundry(toy, "status"), "params.yaml")
    sh(toy, "git", "checkout", "params.yaml")
    (toy / "profiles/base.yaml").write_text("train: {lr: [\n")
    refused(vlfoundry(toy, "run", "--profile", "base"), "base.yaml", "line 2")
    (toy / "launcher.yaml").write_text("ranks: !!x\n")
    with pytest.raises(ConfigError, match=r"launcher\.yaml is not YAML"):
        load_profile(str(toy / "launcher.yaml"))
    assert not (toy / "work" / "workspaces").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9435", ("127.0.0.1", 9435)),
        ("[::1]:9435", ("::1", 9435)),
        (":80", ("127.0.0.1", 80)),
        ("node-7.example:0", ("node-7.example", 0)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert host_and_port(text, "x") == expected
    assert ExecutionProfile(name="here", prometheus=text).prometheus == text


@pytest.mark.parametrize(
    "text", ["host:99999", "host:65536", "host:-1", "host", "host:", "::1:9435", "[::1]", "h:٣", ""]
)
def test_addresses_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"launcher here: prometheus is .* expected host:port"):
        ExecutionProfile(name="here", prometheus=text)


def test_prometheus_answers_over_ipv6(tmp_path: Path) -> None:
    import socket
    import urllib.request

    from tests.infra.test_train_telemetry import WORK
    from vlfoundry.infra.train.telemetry import Telemetry

    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6: {error}")
        port = probe.getsockname()[1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with Telemetry(tmp_path, WORK, prometheus=f"[::1]:{port}"):
        assert opener.open(f"http://[::1]:{port}/metrics", timeout=10).status == 200


@pytest.mark.parametrize("field", ["memory", "mfu", "peak_tflops", "reserve"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_machines_that_cannot_be(field: str, value: float) -> None:
    numbers = {"memory": 80.0, "mfu": 0.4, "peak_tflops": 989.0, "reserve": 4.0, field: value}
    with pytest.raises(ConfigError, match="expected 1 to 1,000,000 GPUs"):
        machine_of(
            8, numbers["memory"], numbers["mfu"], numbers["peak_tflops"], reserve=numbers["reserve"]
        )


@pytest.mark.parametrize(
    "words",
    [
        ("import", "nowhere", "{file}/model"),
        ("export", "nowhere", "{file}/model", "--format", "internvit"),
        ("merge", "nowhere", "{file}/model"),
        ("lineage", "nowhere", "--rows", "{folder}"),
        ("lineage", "nowhere", "--rows", "{file}/rows.parquet"),
        ("report", "--out", "{folder}"),
        ("report", "--out", "/proc/none/report.html"),
    ],
)
def test_targets_come_first(toy: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Before the model is looked for, which these name does not exist."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    places = {"file": str(tmp_path / "file"), "folder": str(tmp_path / "folder")}
    refused(vlfoundry(toy, *(word.format(**places) for word in words)), "rectory")


@pytest.mark.skipif(os.getuid() != 0, reason="mounting takes root")
def test_a_read_only_checkout(toy: Path) -> None:
    place = os.fsencode(toy)
    if LIBC.mount(place, place, None, MS_BIND, None):
        pytest.skip(f"mount: {os.strerror(ctypes.get_errno())}")
    try:
        assert LIBC.mount(None, place, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None) == 0
        for words in (("run",), ("run", "--set", "seed=3"), ("status",), ("report",)):
            refused(vlfoundry(toy, *words), "read-only")
    finally:
        LIBC.umount2(place, 2)


def test_no_home_and_no_repository(toy: Path) -> None:
    assert vlfoundry(toy, "status", HOME="/dev/null").returncode == 0
    shutil.rmtree(toy / ".git")
    for words in (("status",), ("run",), ("run", "--set", "seed=3")):
        refused(vlfoundry(toy, *words), "`git init")


@pytest.mark.parametrize("place", ["work", "artifacts", ".dvc/cache"])
def test_a_full_disk_is_said_before_the_work(toy: Path, place: str, mark: str) -> None:
    with small_disk(toy / place, 3 << 20):
        filler = fill(toy / place)
        refused(vlfoundry(toy, "run"), f"no space left on {toy / place} (0 MB free); make room")
        assert processes_marked(mark) == []
        filler.unlink()
        steer_room = 0 if place == "work" else 200 << 10
        if steer_room:
            fill(toy / place, (1 << 20) + steer_room)
            steer(toy, "prepare", "(out / 'big').write_bytes(bytes(range(256)) * 12000)")
            ended = vlfoundry(toy, "run")
            assert ended.returncode == 1, ended.stdout
            lines = ended.stdout.splitlines()
            said = [line for line in lines if "no space left on" in line and "make room" in line]
            assert said, ended.stdout
            assert str(toy / place) in said[-1]
        time.sleep(2.1)
        clear_part_files(toy / ".dvc/cache")
        assert not list((toy / ".dvc/cache").rglob(".*.tmp"))


def test_part_files_that_somebody_writes_stay(tmp_path: Path) -> None:
    folder = tmp_path / "files/md5/0a"
    folder.mkdir(parents=True)
    for name in (".old.tmp", ".written.tmp", ".new.tmp", "0123.tmp"):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (1, 1))
    os.utime(folder / ".new.tmp")
    with (folder / ".written.tmp").open("ab"):
        clear_part_files(tmp_path)
    assert {path.name for path in folder.iterdir()} == {".written.tmp", ".new.tmp", "0123.tmp"}


@pytest.mark.skipif(os.getuid() != 0, reason="a network of one's own takes root")
def test_without_a_loopback_interface(toy: Path) -> None:
    began = time.monotonic()
    ended = subprocess.run(
        ["unshare", "-n", *RUN, "run"], cwd=toy, capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    if "unshare" in ended.stderr:
        pytest.skip(ended.stderr)
    refused(ended, "127.0.0.1 cannot be reached", "`ip link set lo up`")
    assert time.monotonic() - began < 10


def test_a_failed_stage_is_told_without_prefect_s_words(toy: Path) -> None:
    steer(toy, "prepare", "sys.exit('cannot prepare')")
    ended = vlfoundry(toy, "run")
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    assert "cannot prepare" in said
    for noise in ("NoneType", "Traceback", "ERROR |", "incomplete"):
        assert noise not in said


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh"])
def test_a_stage_whose_processes_are_killed_is_told_so(
    toy: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("SHELL", shell)  # in which DVC starts a stage
    (toy / "work" / "report").mkdir(parents=True)
    (toy / "work" / "report" / "index.html").write_text("of an earlier run")
    steer(toy, "prepare", "print('half', flush=True); os.kill(os.getppid(), 9); time.sleep(60)")
    ended = vlfoundry(toy, "run")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert (
        "prepare failed (was killed by SIGKILL (out of memory?)); its last lines:" in ended.stdout
    )
    assert "report:" not in ended.stdout
