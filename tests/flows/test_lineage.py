"""From a model back to its sources, by what the stages wrote about themselves."""

import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.support.toy_project import commit_all, make_toy, sh
from vlfoundry.flows.cli import app
from vlfoundry.flows.gc import states
from vlfoundry.flows.lineage import lineage_lines, write_rows
from vlfoundry.flows.start import import_model
from vlfoundry.infra.core.errors import DataError, UserError
from vlfoundry.infra.core.workfolder import KEY_FILE, key_of
from vlfoundry.infra.registry.gto import register_model

pytestmark = pytest.mark.slow

DVC_YAML = """\
stages:
  ingest:
    cmd: python stage.py ingest data/raw.txt
    deps: [data/raw.txt]
    outs: [artifacts/ingest/records.parquet, artifacts/ingest/lineage.json]
  filter:
    cmd: python stage.py filter artifacts/ingest/records.parquet
    deps: [artifacts/ingest/records.parquet]
    outs: [artifacts/filter/kept.parquet, artifacts/filter/lineage.json]
  shard:
    cmd: python stage.py shard artifacts/ingest/records.parquet artifacts/filter/kept.parquet
    deps: [artifacts/ingest/records.parquet, artifacts/filter/kept.parquet]
    outs: [artifacts/shard/stage1, artifacts/shard/lineage.json]
  contrastive:
    cmd: python stage.py contrastive artifacts/shard/stage1
    deps: [artifacts/shard/stage1]
    outs: [artifacts/contrastive/model, artifacts/contrastive/lineage.json]
"""
STAGE_PY = """\
import json, pathlib, shutil, sys
name, *inputs = sys.argv[1:]
out = pathlib.Path("artifacts", name)
out.mkdir(parents=True, exist_ok=True)
if name in ("ingest", "filter"):
    shutil.copy(f"data/{name}.parquet", out / ("records" if name == "ingest" else "kept"))
    (out / ("records" if name == "ingest" else "kept")).rename(
        out / ("records.parquet" if name == "ingest" else "kept.parquet"))
else:
    folder = out / ("stage1" if name == "shard" else "model")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"kind": "internvl_c"}))
starts = {}
for path in inputs:
    if path.startswith("data/start/"):
        file = pathlib.Path(path, "origin.json")
        starts[path] = json.loads(file.read_text()) if file.is_file() else None
(out / "lineage.json").write_text(json.dumps(
    {"run_key": f"key-of-{name}", "parameters": {"seed": len(name)},
     "inputs": {path: "d" * 64 for path in inputs}, "starts": starts}))
"""


@pytest.fixture
def run(toy_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose stages leave lineage files, after a run."""
    root = make_toy(tmp_path / "run")
    (root / "data").mkdir()
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "stage.py").write_text(STAGE_PY)
    (root / "data" / "raw.txt").write_text("raw")
    rows = {"row": [0, 1, 2], "caption": ["a cat", "a dog", "noise"]}
    pq.write_table(pa.table(rows), root / "data" / "ingest.parquet")
    pq.write_table(pa.table({"row": [0, 1]}), root / "data" / "filter.parquet")
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin:/usr/bin:/bin")
    sh(root, sys.executable, "-m", "dvc", "repro", "--quiet")
    commit_all(root)
    return root


def test_the_way_back(run: Path, tmp_path: Path) -> None:
    version = register_model(run, Path("artifacts/contrastive/model"))
    shutil.rmtree(run / "artifacts")  # a registered model needs the cache, not the working tree
    lines = lineage_lines(run, version.ref)
    assert lines[0].startswith("internvl_c@v0.1.0 (commit ")
    assert [line.split()[0] for line in lines[1:5]] == ["contrastive", "shard", "filter", "ingest"]
    assert "run key key-of-shard" in lines[2]
    assert lines[2].endswith("<- filter, ingest")
    assert lines[5:] == ["source files:", f"  {'data/raw.txt':34s} sha256 {'d' * 12}"]
    assert write_rows(run, version.ref, tmp_path / "rows.parquet") == 2
    assert pq.read_table(tmp_path / "rows.parquet")["caption"].to_pylist() == ["a cat", "a dog"]


def test_state_that_made_a_registered_model_is_kept(run: Path) -> None:
    """Of each step before it, as long as it is registered."""
    version = register_model(run, Path("artifacts/contrastive/model"))
    for number, key in enumerate(("key-of-shard", "key-of-others", "key-of-nobody")):
        folder = run / "work/shard" / key[:12]
        folder.mkdir(parents=True)
        (folder / KEY_FILE).write_text(key)
        os.utime(folder / KEY_FILE, (number, number))
    found = {key_of(state.folder): state.kept for state in states(run)}
    assert found["key-of-shard"] == "made what lies in artifacts/"
    shutil.rmtree(run / "artifacts")
    found = {key_of(state.folder): state.kept for state in states(run)}
    assert found == {
        "key-of-shard": f"of {version.ref}",
        "key-of-others": None,
        "key-of-nobody": "the last of its step",
    }
    shutil.rmtree(run / ".dvc/cache")
    found = {key_of(state.folder): state.kept for state in states(run)}
    assert "cannot be read here" in (found["key-of-others"] or "")


def test_a_folder_of_the_working_tree(run: Path) -> None:
    assert lineage_lines(run, "artifacts/contrastive/model")[0] == "artifacts/contrastive/model"
    (run / "elsewhere").mkdir()
    (run / "elsewhere" / "config.json").write_text(json.dumps({"kind": "internvl_c"}))
    with pytest.raises(DataError, match=r"elsewhere: no stage of dvc\.lock made it"):
        lineage_lines(run, "elsewhere")


@pytest.mark.parametrize("change", ["other weights", "one more file", "one file less"])
def test_a_folder_that_holds_another_model_has_no_lineage(run: Path, change: str) -> None:
    """A stage that was run by hand leaves another model where dvc.lock knows the earlier one."""
    folder = run / "artifacts/contrastive/model"
    (folder / "weights").write_text("trained")
    sh(run, sys.executable, "-m", "dvc", "commit", "--force", "--quiet", "contrastive")
    assert lineage_lines(run, "artifacts/contrastive/model")
    if change == "other weights":
        (folder / "weights").write_text("trainee")
    elif change == "one more file":
        (folder / "adapters").touch()
    else:
        (folder / "weights").unlink()
    with pytest.raises(DataError, match=r"is not what dvc\.lock says: (weights|adapters) differ"):
        lineage_lines(run, "artifacts/contrastive/model")
    with pytest.raises(DataError, match=r"is not what dvc\.lock says"):
        write_rows(run, "artifacts/contrastive/model", run / "rows.parquet")
    assert not (run / "rows.parquet").exists()


def test_a_folder_outside_of_the_project(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "artifacts/contrastive/model", tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"elsewhere is outside of the project .*run, whose dvc\.lock"
    ):
        lineage_lines(run, str(tmp_path / "elsewhere"))


def test_what_it_went_on_from(run: Path) -> None:
    """A start that is a registered model, and one of which nothing is known."""
    version = register_model(run, Path("artifacts/contrastive/model"))
    import_model(run, version.ref, run / "data/start/last")
    (run / "data/start/found").mkdir()
    (run / "data/start/found/config.json").write_text(json.dumps({"kind": "text"}))
    text = "artifacts/shard/stage1"
    more = f"{text} data/start/last data/start/found"
    listed = f"[{more.replace(' ', ', ')}]"
    changed = DVC_YAML.replace(f"contrastive {text}", f"contrastive {more}")
    (run / "dvc.yaml").write_text(changed.replace(f"deps: [{text}]", f"deps: {listed}"))
    sh(run, sys.executable, "-m", "dvc", "repro", "--quiet")
    commit_all(run)
    lines = lineage_lines(run, "artifacts/contrastive/model")
    assert lines[1].endswith("<- shard, data/start/found, data/start/last")
    assert [line.split()[0] for line in lines[1:5]] == ["contrastive", "shard", "filter", "ingest"]
    found, last = (f"  {f'data/start/{n}':34s} sha256 {'d' * 12}  " for n in ("found", "last"))
    assert lines[5:] == [
        "models that it went on from (their rows are not among those of this run):",
        f"{found}nothing says where it came from",
        f"{last}{version.ref} (commit {version.commit[:12]}, artifacts/contrastive/model)",
        "source files:",
        f"  {'data/raw.txt':34s} sha256 {'d' * 12}",
    ]
    with pytest.raises(DataError, match=rf"last: no stage .* made it, it is {version.ref}"):
        lineage_lines(run, "data/start/last")


def test_rows_do_not_go_over_what_the_project_makes(run: Path, tmp_path: Path) -> None:
    weights = run / "artifacts/contrastive/model/config.json"
    before = weights.read_bytes()
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for place in (weights, run / "data/new.parquet", tmp_path / "notes.txt", Path("/dev/null")):
        with pytest.raises(DataError, match="would be overwritten; name another place"):
            write_rows(run, "artifacts/contrastive/model", place)
    with pytest.raises(UserError, match="is not a plain file"):
        write_rows(run, "artifacts/contrastive/model", tmp_path / "pipe")
    assert Path("/dev/null").is_char_device()
    assert weights.read_bytes() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for _ in range(2):  # rows of an earlier call may be replaced
        assert write_rows(run, "artifacts/contrastive/model", tmp_path / "rows.parquet") == 2


def test_for_programs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_model(run, Path("artifacts/contrastive/model"))
    monkeypatch.chdir(run)
    rows = tmp_path / "rows.parquet"
    ended = CliRunner().invoke(app, ["lineage", "internvl_c", "--json", "--rows", str(rows)])
    facts = json.loads(ended.stdout)
    assert facts["format"] == "vlfoundry.lineage.v1"
    assert facts["path"] == "artifacts/contrastive/model"
    assert [(s["stage"], s["depth"], s["run_key"]) for s in facts["steps"]] == [
        ("contrastive", 0, "key-of-contrastive"), ("shard", 1, "key-of-shard"),
        ("filter", 2, "key-of-filter"), ("ingest", 2, "key-of-ingest"),
    ]  # fmt: skip
    assert facts["steps"][1]["before"] == ["filter", "ingest"]
    assert facts["steps"][1]["parameters"] == {"seed": 5}
    assert facts["sources"] == {"data/raw.txt": "d" * 64}
    assert facts["rows"] == {"path": str(rows), "count": 2}
    plain = CliRunner().invoke(app, ["lineage", "internvl_c", "--json"])
    assert json.loads(plain.stdout)["rows"] is None
