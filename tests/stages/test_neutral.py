"""Modules that are declared neutral cannot change a result: the same bytes come out when every
function of such a module does nothing, or returns something else."""

import contextlib
import importlib
import inspect
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_project import artifacts, run_stage
from vlfoundry.infra.core.code import NEUTRAL, Code
from vlfoundry.infra.core.meaning import Source

pytestmark = pytest.mark.slow

STAGE = "contrastive"
OTHERS: dict[str, Callable[..., Any]] = {
    "infra.core.code.read_code": lambda wanted, *_, **__: {
        step: Code(step=step, modules={}, identity="0" * 64, libraries={}) for step in wanted
    },
    "infra.core.code.Code.stamp": lambda self: {"code": self.identity},
    "infra.core.code.Code.counts_as": lambda self: self.identity,
    "infra.core.code.Code.facts": lambda _self: {"code": "1" * 64},
    "infra.core.meaning.read_source": lambda _text: Source("2" * 64, ()),
    "infra.core.meaning.table_meaning": lambda _text: "3" * 64,
    "infra.core.progress.Progress.__enter__": lambda self: self,
    "infra.train.telemetry.Stopwatch.phase": lambda *_: contextlib.nullcontext(),
    "infra.train.telemetry.Telemetry.__enter__": lambda self: self,
    "infra.train.mfu.peak_flops_per_s": lambda: (17.0, "nowhere"),
    "infra.train.mfu.gemm_rate": lambda *_, **__: 19.0,
    "infra.train.mfu.counted_flops": lambda *_: 23.0,
    "infra.train.mfu.Utilisation.mfu": lambda _self: 0.5,
    "infra.train.mfu.FlopCounter.__enter__": lambda self: self,
    "infra.train.mfu.FlopCounter.get_total_flops": lambda _self: 29,
    "infra.core.workfolder.folder": lambda root, *_: elsewhere(root),
    "infra.core.workfolder.lock_file": lambda root, _: elsewhere(root) / "lock",
}
"""What cannot return None: something else."""
TOLD_IN_LINEAGE = {"vlfoundry.infra.core.code", "vlfoundry.infra.core.meaning"}
"""Of these a lineage.json tells, and it alone."""


def elsewhere(root: Path) -> Path:
    """A folder for state with a name of its own."""
    (root / "work/elsewhere/all").mkdir(parents=True, exist_ok=True)
    return root / "work/elsewhere/all"


def functions(module: types.ModuleType) -> Iterator[tuple[Any, str, str]]:
    """All that a module defines: its owner, its name there, its name in full."""
    short = module.__name__.removeprefix("vlfoundry.")
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            for inner, method in vars(thing).items():
                made = inspect.unwrap(getattr(method, "fget", method))
                code = getattr(made, "__code__", None)
                if code and code.co_filename == module.__file__:
                    yield thing, inner, f"{short}.{name}.{inner}"
        elif callable(thing):
            yield module, name, f"{short}.{name}"


@contextlib.contextmanager
def hollow(name: str) -> Iterator[list[str]]:
    """Every function of a module does nothing, wherever it was imported to."""
    module, hollowed = importlib.import_module(name), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute, full in list(functions(module)):
            before = vars(owner)[attribute]
            other: Any = OTHERS.get(full, lambda *_args, **_options: None)
            if isinstance(before, property):
                other = property(other)
            patch.setattr(owner, attribute, other)
            for user in [m for n, m in sys.modules.items() if n.startswith("vlfoundry.")]:
                for local, thing in list(vars(user).items()):
                    if owner is module and thing is before:
                        patch.setattr(user, local, other)
            hollowed.append(full)
        yield hollowed


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_same_bytes_come_out_without_it(trained: Path, tmp_path: Path, name: str) -> None:
    again = tmp_path / "again"
    left_out = ("work", f"artifacts/{STAGE}")
    shutil.copytree(trained, again, symlinks=True, ignore=lambda folder, names: [
        n for n in names if (Path(folder) / n).relative_to(trained).as_posix() in left_out
    ])  # fmt: skip
    importlib.import_module(f"vlfoundry.stages.{STAGE}")
    with hollow(name) as hollowed:
        run_stage(again, STAGE)
    assert hollowed
    before, after = artifacts(trained, STAGE), artifacts(again, STAGE)
    if name in TOLD_IN_LINEAGE:
        assert before.pop("lineage.json") != after.pop("lineage.json")
    assert after == before


def test_all_that_stands_for_a_function_stands_for_one() -> None:
    known = {full for name in NEUTRAL for *_, full in functions(importlib.import_module(name))}
    assert set(OTHERS) <= known
