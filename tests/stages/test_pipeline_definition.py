"""dvc.yaml and stages/ say the same, and params.yaml and profiles/ hold what stages read.

`dvc.yaml` is written by hand so that it can be read; these tests say what to add or remove there.
"""

import dataclasses
import functools
import importlib
import os
import shutil
from collections.abc import Set
from pathlib import Path

import pytest

from flows.graph import load_graph
from flows.recipes import with_profile
from flows.workspace import Variation, yaml_text
from infra.config import load_params
from infra.git import git
from infra.runkey import PACKAGES, import_closure
from infra.stage import Bound, parameters_of

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Node:
    """A stage as DVC reads it from dvc.yaml, templates filled in."""

    cmd: str
    params: tuple[str, ...]
    data: frozenset[str]
    """dependencies outside our packages"""
    code: frozenset[str]
    """dependencies inside them"""
    outs: frozenset[str]
    """outputs, metrics and plots included"""


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
            code = {path for path in paths if path.partition("/")[0] in PACKAGES}
            nodes[stage.name] = Node(
                cmd=stage.cmd,
                params=tuple(key for dep in params for key in dep.params),
                data=frozenset(paths - code),
                code=frozenset(code),
                outs=frozenset(
                    Path(os.path.relpath(out.fs_path, root)).as_posix() for out in stage.outs
                ),
            )
    return nodes


def modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")


def bound_stages() -> dict[str, Bound]:
    stages = [importlib.import_module(f"stages.{name}").STAGE for name in modules()]
    bound = [stage.bind(variant) for stage in stages for variant in stage.variants or (None,)]
    return {one.address: one for one in bound}


@pytest.fixture(scope="module")
def nodes() -> dict[str, Node]:
    return read_nodes()


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
        assert importlib.import_module(f"stages.{name}").STAGE.name == name


def test_every_stage_is_in_the_pipeline(nodes, stages) -> None:
    fail_with({"stages": differences("stages", set(stages), set(nodes))})


def test_commands(nodes, stages) -> None:
    expected = {
        name: f"exec python -m stages.{one.stage.name}"
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
    fail_with(data_problems(read_nodes(tmp_path), stages, params))
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


def test_sources(nodes, stages) -> None:
    """Every source that a stage may reach is a dependency, and no other."""
    fail_with(
        {
            name: source_problems(
                sources(stages[name].stage.name),
                node.code,
            )
            for name, node in nodes.items()
        }
    )


@functools.cache
def sources(stage: str) -> frozenset[str]:
    return frozenset(path.as_posix() for path in import_closure(f"stages.{stage}", ROOT))


def source_problems(closure: Set[str], deps: Set[str]) -> list[str]:
    def covers(dep: str, path: str) -> bool:
        return Path(path).is_relative_to(dep)

    bare = {path for path in closure if not any(covers(dep, path) for dep in deps)}
    needless = {dep for dep in deps if not any(covers(dep, path) for path in closure)}
    twice = {inner for inner in deps for outer in deps if inner != outer and covers(outer, inner)}
    return [
        *(f"add to deps: {path} (or its folder)" for path in sorted(bare)),
        *(f"remove from deps: {dep} (no source of it is reached)" for dep in sorted(needless)),
        *(f"remove from deps: {dep} (its folder is there)" for dep in sorted(twice)),
    ]


def test_what_the_messages_say() -> None:
    """The checks above can fail, and name what to do."""
    assert differences("params", {"seed", "sft"}, {"sft", "gate"}) == [
        "add to params: seed",
        "remove from params: gate",
    ]
    closure = {"infra/a.py", "infra/train/b.py", "models/c.py"}
    assert source_problems(closure, {"infra/a.py", "infra/train", "models"}) == []
    assert source_problems(closure, {"infra/train", "infra/train/b.py", "eval", "models/c.py"}) == [
        "add to deps: infra/a.py (or its folder)",
        "remove from deps: eval (no source of it is reached)",
        "remove from deps: infra/train/b.py (its folder is there)",
    ]
    with pytest.raises(pytest.fail.Exception, match="  gate: add to params: seed"):
        fail_with({"gate": ["add to params: seed"]})


def test_params_hold_what_stages_read_and_nothing_else(stages) -> None:
    read = {key for one in stages.values() for key in one.stage.parameters}
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
