"""What a new model starts from: the rules of all stages, and what they make of given folders.

Every part of the new model that a folder has goes on from there. Only parts that a rule names may
begin from nothing; for anything else that no folder has, and for a folder of another architecture,
training is refused before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.config import to_dict
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.fingerprint import sha256_bytes
from vlfoundry.models.chat.official import KEPT, PIECES
from vlfoundry.models.estimate.weights import weights
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.folder import (
    is_below,
    read_config,
    refuse_other_adapters,
    weight_shapes,
)

if TYPE_CHECKING:
    from vlfoundry.models.internvl.model import Chunks, InternVL

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one stage fills its new model."""

    kind: str
    """of the new model"""
    takes: dict[str, dict[str, tuple[str, ...]]]
    """name of a folder in the stage's `start` -> {part of the new model: the same in the folder};
    of several the first that the folder has"""
    new: tuple[str, ...]
    """parts, or patterns of them, that may begin from nothing"""
    speak: tuple[str, ...] = ()
    """folders that must have one tokenizer: rows of what they give are its tokens"""


def _same(*parts: str) -> dict[str, tuple[str, ...]]:
    return {part: (part,) for part in parts}


_CONTRAST = ("clip_projector", "text_projection", "logit_scale")
RULES = {
    "contrastive": Rule(
        kind="internvl_c",
        takes={"model": _same("vision", "text", *_CONTRAST, "logit_bias")},
        new=("vision", *_CONTRAST, "logit_bias"),
    ),
    # A bias that stage 1 learnt by the sigmoid loss stays behind: in a softmax it would cancel.
    "generative": Rule(
        kind="internvl_g",
        takes={
            "head": _same("text.head"),
            "model": _same("vision", "text", *_CONTRAST, "clip_projector2", "itm_head"),
        },
        new=(
            "text.query_tokens",
            "text.decoder.layers.*.cross_attention",
            "clip_projector2",
            "itm_head",
        ),
        speak=("model", "head"),
    ),
    "sft@simple": Rule(
        kind="chat_simple",
        takes={
            "vision": _same("vision"),
            "language": {"language": ("language", "text"), "connector": ("connector",)},
        },
        new=("connector",),
    ),
    "sft@full": Rule(
        kind="chat_full",
        takes={
            "qllama": _same("text"),
            "chat": _same("vision", "connector", "query_connector", "language"),
        },
        new=("query_connector",),
    ),
}
"""by the address of the stage"""
ADAPTERS = ("vision.*.lora", "text.*.lora", "language.*.lora")
"""may begin from nothing in every stage that has some"""
BEGINNINGS = frozenset({
    "drop_path", "drop_path_shape", "layerscale_init", "position_init_std", "init_std",
    "embedding_init_std", "lora", "names", "max_tokens",
})  # fmt: skip
"""fields of towers that say how they begin, are trained or are named elsewhere, and not what they
compute; adapters have a check of their own"""
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class PartSource:
    """What comes from one folder."""

    folder: str
    """as the parameters name it"""
    kind: str
    """of the model there"""
    parts: dict[str, str]
    """part of the new model -> part in the folder"""


@dataclass(frozen=True, kw_only=True)
class InitPlan:
    """Where every parameter of a new model begins."""

    part_sources: tuple[PartSource, ...]
    """in the order in which they are loaded"""
    new: tuple[str, ...]
    """parts that begin from nothing"""

    def announce(self, log: Callable[[str], None], record: Callable[..., None]) -> None:
        """Print it, and store it in the run record."""
        for part_source in self.part_sources:
            parts = (t if t == s else f"{t} (its {s})" for t, s in part_source.parts.items())
            log(f"from {part_source.folder} ({part_source.kind}): {', '.join(parts)}")
        log(f"new: {', '.join(self.new) or 'nothing'}")
        record(start={"from": [to_dict(f) for f in self.part_sources], "new": list(self.new)})

    def fill(self, model: InternVL | Chunks, root: Path) -> None:
        """Load what this rank holds of it."""
        from vlfoundry.models.internvl.predict import load_parts

        for part_source in self.part_sources:
            load_parts(model, root / part_source.folder, part_source.parts)


def plan_init(
    address: str, config: InternVLConfig, folders: Mapping[str, str], root: Path
) -> InitPlan:
    """What the model of a stage starts from; reads configs and headers alone.

    Args:
        address: of the stage, a key of `RULES`.
        config: of the new model.
        folders: the stage's `start`: name -> folder, relative to `root`.

    Raises:
        ModelError: a folder is no model, or of another architecture; a part that must not begin
            from nothing is in none; two folders have the same part, or tokenizers that differ.
    """
    rule = RULES[address]
    wanted = {weight.name: weight.shape for weight in weights(rule.kind, config)}
    given: dict[str, str] = {}
    part_sources = []
    for slot, takes in rule.takes.items():
        folder = folders[slot]
        part_source, there = _part_source(folder, takes, wanted, root)
        _refuse_other_architecture(part_source, rule.kind, config, root)
        refuse_other_adapters(config, root / folder, part_source.parts)
        for name in _filled_by(part_source, wanted, there):
            if given.setdefault(name, folder) != folder:
                raise ModelError(
                    f"{given[name]} and {folder} both have {name!r} of the new model; name the "
                    f"one that you mean for both, in {_key(address)}"
                )
        part_sources.append(part_source)
    _refuse_other_tokenizers([folders[slot] for slot in rule.speak], _key(address), root)
    new = _new_parts(address, folders, wanted, given, root)
    return InitPlan(part_sources=tuple(part_sources), new=new)


def _part_source(
    folder: str, takes: Mapping[str, tuple[str, ...]], wanted: Shapes, root: Path
) -> tuple[PartSource, Shapes]:
    """The parts that a folder has of those that are taken, and what else is there."""
    kind, there = read_config(root / folder)[0], weight_shapes(root / folder)
    parts = {
        target: source
        for target, sources in takes.items()
        if any(is_below(name, target) for name in wanted)
        for source in [next((s for s in sources if any(is_below(n, s) for n in there)), None)]
        if source is not None
    }
    return PartSource(folder=folder, kind=kind, parts=parts), there


def _filled_by(part_source: PartSource, wanted: Shapes, there: Shapes) -> Iterator[str]:
    """Names of the new model that are in the folder. Raises ModelError for another shape."""
    for name, shape in wanted.items():
        for target, source in part_source.parts.items():
            theirs = source + name[len(target) :]
            if not is_below(name, target) or theirs not in there:
                continue
            if there[theirs] != shape:
                raise ModelError(
                    f"{theirs!r} has shape {list(there[theirs])} in {part_source.folder}, whose "
                    f"config promises {list(shape)}; the folder is damaged, make it again"
                )
            yield name


def _refuse_other_tokenizers(folders: Sequence[str], key: str, root: Path) -> None:
    """Equal shapes do not show that row 300 is another word there."""
    files = [_vocabulary(root / folder) for folder in folders]
    known = {sha256_bytes(file.read_bytes()) for file in files if file}
    if len(known) > 1:
        raise ModelError(
            f"{' and '.join(folders)} have different tokenizers; set {key} to folders of one run "
            "(`vlfoundry import NAME TARGET --stage pretrain_text` takes the text model of a "
            "registered model's run)"
        )


def _vocabulary(folder: Path) -> Path | None:
    """The file that says which row is which token: ours or an import's; None: there is none."""
    files = (folder / "tokenizer.json", *(folder / KEPT / name for name in PIECES))
    return next((file for file in files if file.is_file()), None)


def _new_parts(
    address: str,
    folders: Mapping[str, str],
    wanted: Shapes,
    given: Mapping[str, str],
    root: Path,
) -> tuple[str, ...]:
    """Parts that no folder has. Raises ModelError where one of them must come from a folder."""
    rule = RULES[address]
    new: dict[str, None] = {}
    for name in wanted:
        if name in given:
            continue
        patterns = (p for p in (*rule.new, *ADAPTERS) if _matches(name, p))
        pattern = next(patterns, None)
        there = next((n for n in given if pattern and _matches(n, pattern)), None)
        if pattern is None:
            raise ModelError(_lacking(address, name, folders, root))
        if there is not None and pattern not in ADAPTERS:
            raise ModelError(
                f"{given[there]} has {there!r} and not {name!r}: only a part of {pattern!r}; "
                "make the folder again"
            )
        new[pattern] = None
    return tuple(new)


def _lacking(address: str, name: str, folders: Mapping[str, str], root: Path) -> str:
    """The message about a parameter that must not begin from nothing."""
    slot, target, sources = max(
        (
            (slot, target, sources)
            for slot, takes in RULES[address].takes.items()
            for target, sources in takes.items()
            if is_below(name, target)
        ),
        key=lambda found: len(found[1]),
    )
    kind, config = read_config(root / folders[slot])
    names = [source + name[len(target) :] for source in sources]
    fitting = [k for k in PARTS if any(w.name in names for w in weights(k, config))]
    return (
        f"{folders[slot]} ({kind}) has no {' or '.join(map(repr, names))}, and {name!r} of the new "
        f"model must not begin from nothing; set {_key(address)}.{slot} to a folder of one of "
        f"the kinds {fitting}"
    )


def _refuse_other_architecture(
    part_source: PartSource, kind: str, ours: InternVLConfig, root: Path
) -> None:
    """Shapes alone do not show heads, norms or the order of merged tokens."""
    theirs = read_config(root / part_source.folder)[1]
    differing: dict[str, None] = {}
    for target, source in part_source.parts.items():
        own, other = _facts(ours, kind, target), _facts(theirs, part_source.kind, source)
        for field, (label, value) in own.items():
            # What only one of both has (queries, say) is new, or stays behind.
            there, found = other.get(field, (label, value))
            if found != value:
                mine = "" if there == label else f"{label} "
                line = f"{there} is {found!r} there and {mine}{value!r} in the parameters"
                differing[line] = None
    if differing:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ModelError(
            f"{part_source.folder} ({part_source.kind}) has another architecture: "
            f"{'; '.join([*differing][:SHOWN])}{more}. Start from another folder, or run with "
            "the folder's own `model`: `vlfoundry import SOURCE TARGET --profile NAME` writes a "
            "profile with it"
        )


def _facts(config: InternVLConfig, kind: str, part: str) -> dict[str, tuple[str, Any]]:
    """What must agree of a part: field -> its name in the parameters, and its value."""
    tower = part.partition(".")[0]
    if tower in ("vision", "text", "language"):
        section = "text" if tower == "language" and config.language is None else tower
        facts = _fields(section, getattr(config, section), BEGINNINGS)
        if part == "text" and "queries" in PARTS[kind]:
            facts |= _fields("queries", config.queries, {"init_std"})
        return facts
    if part == "connector":
        return _fields("connector", config.connector, {"init_std"})
    if part in ("clip_projector", "clip_projector2", "text_projection"):
        return {name: (name, getattr(config, name)) for name in ("embed_dim", "pool_heads")}
    return {}


def _fields(section: str, config: Any, free: Set[str]) -> dict[str, tuple[str, Any]]:
    values = {name: value for name, value in to_dict(config).items() if name not in free}
    if "key_value_heads" in values:
        values["key_value_heads"] = values["key_value_heads"] or values["heads"]
    if values.get("rope_scaling"):  # stretches from there
        values["max_tokens"] = config.max_tokens
    return {name: (f"{section}.{name}", value) for name, value in values.items()}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _key(address: str) -> str:
    """Where the parameters say what the stage starts from."""
    stage, _, variant = address.partition("@")
    return f"{stage}.start.{variant}" if variant else f"{stage}.start"
