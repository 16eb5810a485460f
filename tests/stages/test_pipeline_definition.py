"""dvc.yaml, as DVC reads it, says what stages/ does, and params.yaml and profiles/ hold what stages
read."""

import dataclasses
import importlib
import os
import shutil
from collections.abc import Iterable, Set
from pathlib import Path

import pytest

from vlfoundry.flows.definition import render
from vlfoundry.flows.graph import load_graph
from vlfoundry.flows.recipes import with_profile
from vlfoundry.flows.stamps import CODE
from vlfoundry.flows.workspace import Variation, yaml_text
from vlfoundry.infra.core.code import STEP_FILES, step_file
from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.core.git import git
from vlfoundry.infra.core.stage import Bound, Plot, parameters_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Node:
    """A stage as DVC reads it from dvc.yaml, templates filled in."""

    cmd: str
    params: tuple[str, ...]
    data: frozenset[str]
    """dependencies but for code and parameters"""
    code: frozenset[str]
    """the files that say what code it has"""
    outs: frozenset[str]
    """outputs, metrics and plots included"""
    metrics: frozenset[str]
    plots: frozenset[Plot]
    always: bool
    """whether it always runs"""


def read_nodes(root: Path = ROOT) -> dict[str, Node]:
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.dependency import ParamsDependency
    from dvc.repo import Repo

    nodes = {}
    with Repo(str(root)) as repo:
        for stage in repo.index.stages:
            if not getattr(stage, "name", None):
                continue  # a file that `dvc add` tracks
            params = [d for d in stage.deps if isinstance(d, ParamsDependency)]
            paths = {
                Path(os.path.relpath(dep.fs_path, root)).as_posix()
                for dep in stage.deps
                if not isinstance(dep, ParamsDependency)
            }
            code = {path for path in paths if path.startswith(STEP_FILES)}
            relative = {
                out: Path(os.path.relpath(out.fs_path, root)).as_posix() for out in stage.outs
            }
            nodes[stage.name] = Node(
                cmd=stage.cmd,
                params=tuple(key for dep in params for key in dep.params),
                data=frozenset(paths - code),
                code=frozenset(code),
                outs=frozenset(relative.values()),
                metrics=frozenset(path for out, path in relative.items() if out.metric),
                plots=frozenset(
                    Plot(path=path, **out.plot) for out, path in relative.items() if out.plot
                ),
                always=stage.always_changed,
            )
    return nodes


def modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")


def bound_stages() -> dict[str, Bound]:
    stages = [importlib.import_module(f"vlfoundry.stages.{name}").STAGE for name in modules()]
    bound = [stage.bind(variant) for stage in stages for variant in stage.variants or (None,)]
    return {one.address: one for one in bound}


@pytest.fixture(scope="module")
def all_nodes() -> dict[str, Node]:
    return read_nodes()


@pytest.fixture(scope="module")
def nodes(all_nodes: dict[str, Node]) -> dict[str, Node]:
    """Without the step `code`."""
    return {name: node for name, node in all_nodes.items() if name != CODE}


@pytest.fixture(scope="module")
def stages() -> dict[str, Bound]:
    return bound_stages()


def differences(kind: str, expected: Set[str], found: Set[str]) -> list[str]:
    """What to change in dvc.yaml so that `found` becomes `expected`."""
    return [f"add to {kind}: {name}" for name in sorted(expected - found)] + [
        f"remove from {kind}: {name}" for name in sorted(found - expected)
    ]


def fail_with(problems: dict[str, list[str]]) -> None:
    lines = [f"  {name}: {line}" for name, lines in problems.items() for line in lines]
    if lines:
        pytest.fail("dvc.yaml differs from stages/:\n" + "\n".join(lines), pytrace=False)


def test_every_module_is_a_stage_of_its_name() -> None:
    for name in modules():
        assert importlib.import_module(f"vlfoundry.stages.{name}").STAGE.name == name


def test_every_stage_is_in_the_pipeline(nodes, stages) -> None:
    fail_with({"stages": differences("stages", set(stages), set(nodes))})


def test_commands(nodes, stages) -> None:
    expected = {
        name: f"exec python -m vlfoundry.stages.{one.stage.name}"
        + (f" variant={one.variant}" if one.variant else "")
        for name, one in stages.items()
    }
    assert {name: node.cmd for name, node in nodes.items()} == expected


def test_parameters(nodes, stages) -> None:
    fail_with(
        {
            name: differences("params", set(stages[name].stage.parameters), set(node.params))
            for name, node in nodes.items()
        }
    )


def test_data_that_is_read(nodes, stages) -> None:
    fail_with(data_problems(nodes, stages, load_params(ROOT / "params.yaml")))


def data_problems(nodes, stages, params) -> dict[str, list[str]]:
    """Between what stages read with these parameters and what DVC fills in with the same."""
    expected = {name: one.inputs(parameters_of(one.stage, params)) for name, one in stages.items()}
    return {
        name: differences("deps", set(expected[name]), node.data) for name, node in nodes.items()
    }


LAST = (
    "contrastive.start.model=data/start/last",
    "evaluate.baseline.internvl_c=data/start/last",
)
SAME = (  # each twice: DVC must not take that for a mistake
    "generative.start={model: data/start/g, head: data/start/g}",
    "sft.start.simple={vision: data/start/chat, language: data/start/chat}",
    "sft.start.full={qllama: data/start/full, chat: data/start/full}",
)


@pytest.mark.parametrize(
    ("variation", "upstream"),
    [
        (
            Variation(),
            {
                "contrastive": ("pretrain_text", "shard"),
                "generative": ("contrastive", "pretrain_text", "shard"),
                "sft@simple": ("contrastive", "pretrain_text", "shard"),
                "sft@full": ("generative", "sft@simple", "shard"),
            },
        ),
        (
            Variation(overrides=LAST),
            {
                "contrastive": ("shard",),
                "generative": ("contrastive", "pretrain_text", "shard"),
            },
        ),
        (
            Variation(overrides=SAME),
            {"generative": ("shard",), "sft@simple": ("shard",), "sft@full": ("shard",)},
        ),
        # A recipe's sections stand for themselves, and say nothing of folders.
        (
            Variation(profile="internvl-c", overrides=LAST),
            {"contrastive": ("shard",), "sft@full": ("generative", "sft@simple", "shard")},
        ),
    ],
    ids=["default", "last", "same", "recipe"],
)
def test_edges_follow_the_parameters(
    stages, tmp_path: Path, variation: Variation, upstream: dict[str, tuple[str, ...]]
) -> None:
    params = variation.apply(ROOT)
    for name in ("dvc.yaml", ".dvc/config", ".dvcignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "params.yaml").write_text(yaml_text(params), encoding="utf-8")
    git(tmp_path, "init", "--quiet")
    found = {name: node for name, node in read_nodes(tmp_path).items() if name != CODE}
    fail_with(data_problems(found, stages, params))
    graph = load_graph(tmp_path)
    assert {name: graph.node(name).upstream for name in upstream} == upstream
    needed = graph.needed_for(("contrastive",))
    assert ("pretrain_text" in needed) == (variation.overrides != LAST)


def test_outputs(nodes, stages) -> None:
    fail_with(
        {
            name: differences("outs", {*stages[name].outputs, stages[name].lineage}, node.outs)
            for name, node in nodes.items()
        }
    )


def test_metrics_and_plots(nodes, stages) -> None:
    """Both are outputs, and no output is both."""
    for name, one in stages.items():
        plotted = tuple(plot.path for plot in one.plots)
        assert {*one.metrics, *plotted} <= set(one.outputs), name
        assert len({*one.metrics, *plotted}) == len(one.metrics) + len(plotted), name
    fail_with(
        {
            name: differences("metrics", set(stages[name].metrics), node.metrics)
            + differences("plots", shown(stages[name].plots), shown(node.plots))
            for name, node in nodes.items()
        }
    )


def shown(plots: Iterable[Plot]) -> set[str]:
    """As dvc.yaml has them."""
    facts = [dataclasses.asdict(plot) for plot in plots]
    return {f"{plot.pop('path')}: {plot}" for plot in facts}


def test_what_is_read_is_made_by_a_stage_or_shipped(nodes) -> None:
    made = [Path(out) for node in nodes.values() for out in node.outs]
    orphans = [
        f"{name} reads {path}, which no stage makes and which is not in the repository"
        for name, node in nodes.items()
        for path in sorted(node.data)
        if not any(Path(path).is_relative_to(out) for out in made)
        and not (path.startswith("data/") and (ROOT / path).exists())
    ]
    assert not orphans, "\n".join(orphans)


def test_it_is_rendered_from_the_stages() -> None:
    assert render() == (ROOT / "dvc.yaml").read_text("utf-8"), "run `vlfoundry graph --write`"


def test_the_code_of_every_stage_is_said_by_the_step_that_always_runs(all_nodes, stages) -> None:
    assert all_nodes[CODE].outs == {step_file(name) for name in stages}
    assert [name for name, node in all_nodes.items() if node.always] == [CODE]
    assert {name: {step_file(name)} for name in stages} == {
        name: node.code for name, node in all_nodes.items() if name != CODE
    }


def test_what_the_messages_say() -> None:
    """The checks above can fail, and name what to do."""
    assert differences("params", {"seed", "sft"}, {"sft", "gate"}) == [
        "add to params: seed",
        "remove from params: gate",
    ]
    with pytest.raises(pytest.fail.Exception, match="  gate: add to params: seed"):
        fail_with({"gate": ["add to params: seed"]})


def test_params_hold_what_stages_read_and_nothing_else(stages) -> None:
    read = {key for one in stages.values() for key in one.stage.parameters} | {CODE}
    problems = differences("params.yaml", read, set(load_params(ROOT / "params.yaml")))
    assert not problems, "\n".join(problems)


def test_params_and_every_profile_build_every_stage(stages) -> None:
    params = load_params(ROOT / "params.yaml")
    profiles = {
        path.stem: with_profile(params, ROOT, path.stem)
        for path in sorted((ROOT / "profiles").glob("*.yaml"))
    }
    for values in ({"params.yaml": params} | profiles).values():
        for one in stages.values():
            parameters_of(one.stage, values)
