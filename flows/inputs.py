"""Whether what stages read is there: asked before the first one starts."""

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from vlfoundry.flows.graph import Graph
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.stage import START_FOLDER

GUIDE = "data/README.md"
SHOWN = 3


def check_inputs(root: Path, graph: Graph, names: Collection[str]) -> None:
    """Raises DataError where the stages `names` read what is not there and what no stage makes.

    A stage would say so when its turn comes, hours later perhaps.
    """
    for node in graph.nodes:
        if node.name in names and (
            missing := [p for p in node.deps if _is_missing(root, graph, p)]
        ):
            raise DataError(f"{node.name} reads {_listed(missing)}; {_advice(root, missing)}")


def _is_missing(root: Path, graph: Graph, path: str) -> bool:
    if "://" in path or (root / path).exists():
        return False
    wanted = PurePosixPath(path)
    makers = (node for node in graph.nodes if node.cmd or node.deps)  # not what `dvc add` keeps
    outs = (PurePosixPath(out) for node in makers for out in node.outs)
    return not any(wanted.is_relative_to(out) or out.is_relative_to(wanted) for out in outs)


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    verb = "does" if len(paths) == 1 else "do"
    return f"{', '.join(paths[:SHOWN])}{more}, which {verb} not exist"


def _advice(root: Path, missing: list[str]) -> str:
    starts = [path for path in missing if PurePosixPath(path).is_relative_to(START_FOLDER)]
    if starts:
        return f"`vlfoundry import SOURCE {starts[0]}` makes it of a model"
    if (root / f"{missing[0]}.dvc").is_file():
        return "`dvc pull` gets what `dvc add` has kept"
    if (root / GUIDE).is_file():
        return f"{GUIDE} says what to put there"
    return "put them there" if missing[1:] else "put it there"
