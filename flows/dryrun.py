"""`vlfoundry run --dry-run`: what would run, why and where, with nothing of the project changed."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlfoundry.flows.addresses import check_stages
from vlfoundry.flows.graph import Graph, load_graph
from vlfoundry.flows.inputs import check_inputs
from vlfoundry.flows.parameters import check_parameters
from vlfoundry.flows.workspace import KEPT_FILES, Variation, workspace_folder, yaml_text
from vlfoundry.infra.core.code import STEP_FILES
from vlfoundry.infra.core.config import PARAMS_FILE
from vlfoundry.infra.core.dvccache import share_settings
from vlfoundry.infra.core.errors import DataError

OWN = (".git", ".dvc", "work", "artifacts", PARAMS_FILE, *KEPT_FILES)
"""what a workspace does not share with the project that it is made from"""


def dry_run_lines(
    root: Path, stages: tuple[str, ...], variation: Variation, folder: Path | None
) -> list[str]:
    """What `vlfoundry run` would do, a line a stage.

    Args:
        root: the project.
        stages: that were asked for; all if empty.
        variation: how the parameters differ.
        folder: the workspace, if one was named.

    Raises:
        ConfigError: there is no such stage, profile or parameter.
    """
    check_stages(root, stages)
    if not (variation or folder):
        check_parameters(root)
        with _likeness(root, root, None) as place:
            return _lines(place, stages)
    workspace = workspace_folder(root, variation, folder)
    params = variation.apply(root)
    check_parameters(root, params)
    head = f"workspace: {workspace}" + ("" if workspace.exists() else ", which would be made")
    with _likeness(root, workspace, params) as place:
        return [head, *_lines(place, stages)]


def _lines(place: Path, stages: tuple[str, ...]) -> list[str]:
    graph = load_graph(place, lambda line: print(line, file=sys.stderr))
    needed = graph.needed_for(stages)
    counts = {"run": 0, "restored": 0}
    lines = []
    for node in graph.nodes:
        if node.name in needed:
            lines.append(f"{node.name:28s} {_said(graph, node.name)}")
            if node.name in graph.stale:
                counts["restored" if node.name in graph.restorable else "run"] += 1
    return [
        *lines,
        f"{counts['run']} of {len(needed)} stages would run, {counts['restored']} would come from "
        "DVC's cache",
        *_missing(place, graph, needed & graph.stale),
    ]


def _missing(place: Path, graph: Graph, names: frozenset[str]) -> list[str]:
    try:
        check_inputs(place, graph, names)
    except DataError as error:
        return [f"it could not start: {error}"]
    return []


def _said(graph: Graph, name: str) -> str:
    reason = graph.reason(name)
    if reason is None:
        return "up to date"
    return f"{'from the cache' if name in graph.restorable else 'would run'}: {reason}"


@contextlib.contextmanager
def _likeness(root: Path, workspace: Path, params: Mapping[str, Any] | None) -> Iterator[Path]:
    """A folder that DVC takes for the workspace as the run would find it: links to the project's
    files, beside parameters, dvc.lock and outputs of its own. DVC's locks lie there, too."""
    with tempfile.TemporaryDirectory(prefix="vlfoundry-dry-run-") as name:
        place = Path(name).resolve()
        for path in root.iterdir():
            if path.name not in OWN:
                (place / path.name).symlink_to(path)
        (place / ".dvc").mkdir()
        (place / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
        share_settings(root, place)
        if params is None:
            shutil.copyfile(root / PARAMS_FILE, place / PARAMS_FILE)
        else:
            (place / PARAMS_FILE).write_text(yaml_text(dict(params)), encoding="utf-8")
        kept = workspace if workspace.exists() else root
        for lock in KEPT_FILES:
            if (kept / lock).is_file():
                shutil.copyfile(kept / lock, place / lock)
        if (workspace / "artifacts").is_dir():
            (place / STEP_FILES).mkdir(parents=True)  # what the code means is said here, not there
            for path in (workspace / "artifacts").iterdir():
                if path != workspace / STEP_FILES:
                    (place / "artifacts" / path.name).symlink_to(path)
        yield place
