"""The adapter over DVC's internals, held to what DVC's own commands print."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.toy_project import sh
from vlfoundry.flows.graph import Graph, load_graph, order_lock
from vlfoundry.infra.core.errors import ConfigError, DataError

pytestmark = pytest.mark.slow


def edges(graph: Graph) -> set[tuple[str, str]]:
    return {(upstream, node.name) for node in graph.nodes for upstream in node.upstream}


def edges_of_dvc_dag(root: Path) -> set[tuple[str, str]]:
    dot = sh(root, sys.executable, "-m", "dvc", "dag", "--dot")
    return set(re.findall(r'"([^"]+)" -> "([^"]+)";', dot))


def test_the_graph_is_what_dvc_dag_prints(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = load_graph(toy)  # from another working directory: names must not depend on it
    assert edges(graph) == edges_of_dvc_dag(toy)
    assert [node.name for node in graph.nodes] == ["prepare", "train@a", "train@b", "score"]
    train = graph.node("train@a")
    assert train.cmd == "exec python work.py train a"
    assert train.deps == ("artifacts/prepare",)
    assert train.outs == ("artifacts/train/a",)
    assert (train.slots, train.timeout_s) == (None, 60)
    assert graph.node("prepare").slots == 1


def test_what_is_stale_follows_dvc_status(toy: Path) -> None:
    graph = load_graph(toy)
    assert graph.stale == {"prepare", "train@a", "train@b", "score"}
    assert set(graph.changed.values()) == {"never run"}
    sh(toy, sys.executable, "-m", "dvc", "repro", "--quiet")
    assert load_graph(toy).stale == frozenset()
    (toy / "params.yaml").write_text("seed: 1\nstart: scratch\ntrain:\n  lr: 0.5\n")
    graph = load_graph(toy)
    assert set(graph.changed) == {"train@a", "train@b"}
    assert graph.stale == {"train@a", "train@b", "score"}
    assert graph.changed["train@a"] == "changed deps: params.yaml (train)"


def test_a_stage_brings_what_it_needs(toy: Path) -> None:
    graph = load_graph(toy)
    assert graph.needed_for(("train@b",)) == {"prepare", "train@b"}
    assert graph.needed_for(("train",)) == {"prepare", "train@a", "train@b"}
    assert len(graph.needed_for(())) == 4
    with pytest.raises(ConfigError, match=r"no stage 'trian' in dvc\.yaml; expected one of"):
        graph.needed_for(("trian",))


def test_a_broken_pipeline_is_a_message(toy: Path) -> None:
    for text, where in (
        ("stages:\n  a: {cmd: [}}", r"line 2, column 13"),
        (
            "stages: {a: {cmd: x, wat: 1}}",
            r"extra keys not allowed @ data\['stages'\]\['a'\]\['wat'\]",
        ),
    ):
        (toy / "dvc.yaml").write_text(text)
        with pytest.raises(DataError, match=f"DVC cannot read the pipeline.*{where}"):
            load_graph(toy)


def test_the_lock_does_not_tell_in_which_order_stages_ended(toy: Path) -> None:
    dvc = (sys.executable, "-m", "dvc", "repro", "--quiet")
    sh(toy, *dvc)
    order_lock(toy, load_graph(toy))
    expected = (toy / "dvc.lock").read_bytes()
    (toy / "dvc.lock").unlink()
    sh(toy, *dvc, "train@b")
    sh(toy, *dvc)
    assert (toy / "dvc.lock").read_bytes() != expected

    order_lock(toy, load_graph(toy))
    assert (toy / "dvc.lock").read_bytes() == expected
    assert load_graph(toy).stale == frozenset()
