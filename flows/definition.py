"""dvc.yaml, rendered from the STAGE of each module of `stages/`.

The first step, `code`, always runs and says what the code of each other one means
(`infra/core/code.py`); so no source file is listed.
"""

import dataclasses
import importlib
import importlib.metadata
import inspect
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.flows.recipes import TEMPLATE
from vlfoundry.flows.stamps import CODE, COMMAND
from vlfoundry.infra.core import code
from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.files import write_atomic
from vlfoundry.infra.core.project import DEFINITION, PROJECT_FORMAT
from vlfoundry.infra.core.stage import Stage, parameters_of

HEAD = """\
# The pipeline, as DVC reads it. Rendered from the STAGE of each module of vlfoundry.stages: in the
# repository by `vlfoundry graph --write`, in a project by `vlfoundry upgrade`, which keeps stages
# that you add.
#
# The step `code` always runs, in under a second, and says what the code of each other step means;
# comments, formatting and annotations mean nothing. Where and how wide a step runs stands in a
# launcher profile, so that it never changes what is reproduced. `exec`: the step takes the place of
# the shell that DVC starts it in ($SHELL), so that its parent is DVC; some shells do not do so by
# themselves, and under those a step would outlive a DVC that is killed.
stages:
"""


def definition_text() -> str:
    """dvc.yaml of a new project: what `render` gives, as it is packed."""
    return (TEMPLATE / DEFINITION).read_text(encoding="utf-8")


def render() -> str:
    """dvc.yaml of all stages, each after those that it reads from by default."""
    stages = [importlib.import_module(f"vlfoundry.stages.{name}").STAGE for name in code.steps()]
    ordered = _in_order(stages, load_params(TEMPLATE / "params.yaml"))
    return HEAD + "\n".join(["\n".join(_code_lines()) + "\n", *map(_stage_text, ordered)])


def updated(root: Path) -> str:
    """dvc.yaml of a project with our stages as they are now, and its own ones as they stand.

    Raises DataError if what stands there is not YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML()
    yaml.width = 4096
    try:
        found = yaml.load((root / DEFINITION).read_text(encoding="utf-8")) or {}
    except YAMLError as error:
        raise DataError(f"{root / DEFINITION} is not YAML: {error}") from error
    text = render()
    ours = YAML(typ="safe", pure=True).load(text)
    stages = found.pop("stages", {}) or {}
    for name in ours["stages"]:
        stages.pop(name, None)
    if stages:
        stream = io.StringIO()
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.dump({"stages": stages}, stream)
        text += "\n  # --- your own\n" + stream.getvalue().partition("\n")[2]
    if found:
        stream = io.StringIO()
        yaml.dump(found, stream)
        text += "\n" + stream.getvalue()
    return text


def write(root: Path) -> bool:
    """Render dvc.yaml of the repository again; False if it says so already."""
    path, text = root / DEFINITION, render()
    if path.read_text(encoding="utf-8") == text:
        return False
    write_atomic(path, text)
    return True


def _code_lines() -> Iterator[str]:
    version = importlib.metadata.version("vlfoundry")
    yield f"  {CODE}:"
    yield "    desc: What the code of each step means."
    yield f"    cmd: {COMMAND}"
    yield "    always_changed: true"
    yield f"    meta: {{project_format: {PROJECT_FORMAT}, written_by: vlfoundry {version}}}"
    yield "    outs:"
    for name in code.steps():
        yield f"      - {code.step_file(name)}: {{cache: false, persist: true}}"


def _in_order(stages: Sequence[Stage], params: Mapping[str, Any]) -> list[Stage]:
    """Topological; ties by name."""
    reads = {
        stage.name: {
            path
            for variant in stage.variants or (None,)
            for path in stage.bind(variant).inputs(parameters_of(stage, dict(params)))
        }
        for stage in stages
    }
    makes = {
        stage.name: {
            Path(path)
            for variant in stage.variants or (None,)
            for path in (*stage.bind(variant).outputs, stage.bind(variant).lineage)
        }
        for stage in stages
    }

    def before(name: str) -> set[str]:
        return {
            other
            for other, made in makes.items()
            if other != name
            and any(Path(path).is_relative_to(out) for path in reads[name] for out in made)
        }

    waiting, ordered = sorted(stages, key=lambda stage: stage.name), list[Stage]()
    while waiting:
        done = {stage.name for stage in ordered}
        ready = next(stage for stage in waiting if before(stage.name) <= done)
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


@dataclasses.dataclass(frozen=True)
class _Items:
    """What differs between the variants of a stage, by names that all have."""

    inputs: dict[str, tuple[str, ...]]
    starts: dict[str, tuple[str, ...]]

    def line(self, variant: str) -> str:
        pairs = [f"input_{n}: {path}" for n, path in enumerate(self.inputs[variant], 1)]
        pairs += [f"start_{n}: '${{{name}}}'" for n, name in enumerate(self.starts[variant], 1)]
        return f"{{{', '.join(pairs)}}}"

    @property
    def names(self) -> Iterator[str]:
        yield from (f"${{item.input_{n + 1}}}" for n in range(_width(self.inputs)))
        yield from (f"${{item.start_{n + 1}}}" for n in range(_width(self.starts)))


def _width(rows: Mapping[str, tuple[str, ...]]) -> int:
    return max(map(len, rows.values()))


def _padded(rows: dict[str, tuple[str, ...]], name: str) -> dict[str, tuple[str, ...]]:
    """All of one width: the last one again, which DVC counts once."""
    width = _width(rows)
    assert not width or all(rows.values()), f"stage {name}: a variant has none where others have"
    return {key: (*row, *row[-1:] * (width - len(row))) for key, row in rows.items()}


def _stage_text(stage: Stage) -> str:
    if not stage.variants:
        starts = [f"${{{name}}}" for name in stage.start_parameters(None)]
        return "\n".join([f"  {stage.name}:", *_body(stage, starts)]) + "\n"
    items = _Items(
        _padded({v: stage.variant_inputs.get(v, ()) for v in stage.variants}, stage.name),
        _padded({v: stage.start_parameters(v) for v in stage.variants}, stage.name),
    )
    lines = [f"  {stage.name}:", "    foreach:"]
    lines += [f"      {variant}: {items.line(variant)}" for variant in stage.variants]
    lines += ["    do:", *(f"  {line}" for line in _body(stage, list(items.names)))]
    return "\n".join(lines) + "\n"


def _body(stage: Stage, further: Sequence[str]) -> Iterator[str]:
    variant = "${key}" if stage.variants else ""
    module = inspect.getmodule(stage.run)
    about = (inspect.getdoc(module) or "").partition("\n")[0]
    meta = f"{{cpu: {stage.cpu or 'all'}, timeout_s: {stage.timeout_s}}}"
    shown = {*stage.metrics, *(plot.path for plot in stage.plots)}
    folder = f"artifacts/{stage.name}" + (f"/{variant}" if variant else "")
    yield f"    desc: {json.dumps(about, ensure_ascii=False)}"
    yield f"    cmd: exec python -m vlfoundry.stages.{stage.name}" + (
        f" variant={variant}" if variant else ""
    )
    yield f"    params: [{', '.join(stage.parameters)}]"
    yield "    deps:"
    for path in (code.step_file(stage.name), *stage.inputs, *further):
        yield f"      - {_filled(path, variant)}"
    yield f"    meta: {meta}"
    yield "    outs:"
    for path in (*(path for path in stage.outputs if path not in shown), f"{folder}/lineage.json"):
        yield f"      - {_filled(path, variant)}"
    if stage.metrics:
        yield "    metrics:"
        yield from (f"      - {_filled(path, variant)}" for path in stage.metrics)
    if stage.plots:
        yield "    plots:"
    for plot in stage.plots:
        title = json.dumps(_filled(plot.title, variant), ensure_ascii=False)
        yield f"      - {_filled(plot.path, variant)}:"
        yield f"          {{x: {plot.x}, y: {plot.y}, title: {title}, template: {plot.template}}}"


def _filled(text: str, variant: str) -> str:
    return text.replace("{variant}", variant)
