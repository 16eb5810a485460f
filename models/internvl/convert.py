"""Official model folders to ours and back, tensor by tensor.

An imported model folder has, beside its config and weights (in the types they came in), a folder
`official` with the config, the tokenizer and the other small files as they were.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.core.files import new_folder
from vlfoundry.infra.core.givenfiles import read_mapping, shown
from vlfoundry.infra.core.tensorfiles import TensorFacts, TensorFiles, write_tensors
from vlfoundry.models.chat.official import KEPT, OfficialTokenizer, small_files, template_name
from vlfoundry.models.chat.templates import IMG_CONTEXT
from vlfoundry.models.internvit import hf as vision_hf
from vlfoundry.models.internvl import hf
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.folder import read_config, refuse_overwriting, write_config
from vlfoundry.models.internvl.handover import (
    LANGUAGE,
    PICTURES,
    has_tokenizer,
    is_ours,
    pictures_told,
    tiles,
    unlike_ours,
    write_companions,
)
from vlfoundry.models.internvl.hf_fields import taken_defaults, unknown_fields
from vlfoundry.models.internvl.lora import BASE_LAYER, MergedFiles, adapters, peft_keys
from vlfoundry.models.internvl.source import (
    by_names_of,
    from_heads,
    refuse_unequal,
    require_adapters,
    require_finite,
    require_layers,
    stored_heads,
    untied,
)
from vlfoundry.models.internvl.tokenizer import load_tokenizer
from vlfoundry.models.official.keymap import Key, check_names
from vlfoundry.models.tokenizer import IMG_CONTEXT_ID, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

SOLO = ("vision", "internvl_c")
"""what can be taken alone of a larger model"""
BUFFERS = (".rotary_emb.inv_freq",)
"""ends of names in old files that are no weights: they are computed from the config"""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to store models outside."""

    kind: str
    """which of our configurations it holds"""
    about: str
    """one line for messages"""
    read: Callable[[Mapping], InternVLConfig]
    """its config.json as ours"""
    keys: Callable[[InternVLConfig, str], Iterator[Key]]
    """its names and ours, of a configuration"""
    unused: str = ""
    """in front of names that a file of it may also have and the configuration does not use"""
    other_names: tuple[Callable[[str], str], ...] = ()
    """from a name to what else the tensor is called in files of it"""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done, for people."""

    format: str
    """name in `FORMATS`"""
    kind: str
    """of our configuration"""
    tensors: int
    """written"""
    size: int
    """bytes of the tensors written"""
    left_out: tuple[str, ...]
    """names in the source that were left out on purpose"""
    unknown: tuple[str, ...] = ()
    """fields of its config.json that no official class has, and that were not looked at"""
    note: str = ""
    """what the reader of an export does in another way"""

    @property
    def summary(self) -> str:
        """How much was written."""
        return f"{self.tensors} tensors, {self.size / 1e9:.3f} GB"


def _vision_alone(config: Mapping) -> InternVLConfig:
    vision = vision_hf.config_from_official(config)
    return InternVLConfig(vision=vision)


FORMATS = {
    "internvit": Format(
        kind="vision",
        about="an InternViT folder (InternVisionModel)",
        read=_vision_alone,
        keys=hf.keys,
    ),
    "internvl_14b": Format(
        kind="internvl_g",
        about="an InternVL-14B folder (InternVLModel: InternVL-C and -G)",
        read=hf.config_from_official,
        keys=hf.keys,
    ),
    "internvl_chat": Format(
        kind="chat_simple",
        about="an InternVL-Chat folder (InternVLChatModel)",
        read=hf.config_from_official,
        keys=hf.keys,
    ),
    "transformers": Format(
        kind="chat_simple",
        about="a folder of transformers' own internvl (InternVLForConditionalGeneration)",
        read=hf.config_from_native,
        keys=lambda config, _kind: hf.native_keys(config),
        other_names=(hf.saved_name, hf.base_name),
    ),
    "llava": Format(
        kind="chat_simple",
        about="an InternVL-Chat 1.0 folder in LLaVA's form (LlavaLlamaForCausalLM)",
        read=hf.config_from_llava,
        keys=hf.llava_keys,
    ),
    "llava_full": Format(
        kind="chat_full",
        about="an InternVL-Chat 1.0 folder in LLaVA's form with QLLaMA (two_mlp)",
        read=hf.config_from_llava,
        keys=hf.llava_keys,
        # Of QLLaMA's texts Chat full uses none, so that it has no head onto the vocabulary.
        unused=f"{hf.LLAVA_TOWER}qllama.lm_head.",
    ),
    "internvit_pth": Format(
        kind="vision",
        about="a timm-style PyTorch file of InternViT",
        read=_vision_alone,
        keys=hf.timm_keys,
        unused="clip_projector.",
    ),
    "internvl_c_pth": Format(
        kind="internvl_c",
        about="a timm-style PyTorch file of InternVL-C",
        read=hf.config_from_official,
        keys=hf.timm_keys,
    ),
}
PYTORCH_FILES = ("internvit_pth", "internvl_c_pth")
"""formats of one PyTorch file"""


def import_model(
    source: str | Path,
    target: str | Path,
    *,
    kind: str | None = None,
    config_file: Path | None = None,
    tower_config: Path | None = None,
) -> Conversion:
    """Make a model folder of an official one.

    Args:
        source: a folder with config.json and safetensors or PyTorch files, or a timm-style
            PyTorch file.
        target: a folder that is to be.
        kind: "internvl_c" takes that part of an InternVL-14B; "vision" the tower of any model;
            None: everything.
        config_file: the official config.json, of an InternViT or an InternVL-14B, where the
            source is a PyTorch file; None: the one beside it.
        tower_config: the official config.json of the vision tower, where the source is in LLaVA's
            form: of an InternViT, or of the InternVL-14B of a Chat full.

    Raises:
        ModelError: the source is of no known format, or a tensor is missing, surplus, of another
            shape or not finite; the message names it. Nothing is left in the target then.
        ConfigError: config.json has an option that is not built here, or a value that cannot be.
    """
    source, target = Path(source), Path(target)
    inside = source if source.is_dir() else source.parent
    given, config_file = config_file is not None, config_file or inside / "config.json"
    name, facts = _recognise(config_file, None if given else inside)
    if not source.is_dir():
        name = _as_pytorch_file(name, config_file)
    form = FORMATS[name]
    if tower_config is not None:
        facts[hf.TOWER] = read_mapping(tower_config)
    config = _read_config(config_file, form, facts)
    _require_part(form.kind, kind)
    if name == "transformers":
        told = pictures_told(source)
        config = dataclasses.replace(config, pictures=told) if told else config
    refuse_overwriting(target)
    small = small_files(source) if source.is_dir() else []
    ours = source.is_dir() and is_ours(source)
    with TensorFiles(source, inside=inside) as files, new_folder(target) as part:
        try:
            require_layers(name, form.kind, config, files)
            require_adapters(name, facts, files)
        except ConfigError as error:
            raise ConfigError(f"{config_file}: {error}") from None
        table, copies = _table(form, config, files)
        chosen = _chosen(table, config, form.kind, kind)
        buffers = [
            n
            for n in files.facts
            if n.endswith(BUFFERS) or (form.unused and n.startswith(form.unused))
        ]
        there = {n: fact.shape for n, fact in files.facts.items() if n not in buffers}
        wanted = {n: shape for key in table for n, shape in key.theirs}
        wanted |= {head: wanted[embedding] for head, embedding in copies.items()}
        check_names(str(source), there, wanted, _defaults(taken_defaults(name, facts)))
        refuse_unequal(files, copies)
        done = _import_tensors(files, chosen, part / "weights.safetensors")
        taken = {n for key in chosen for n in key.names}
        if source.is_dir():
            _keep(small, part / KEPT)
            if ours:
                shutil.copyfile(part / KEPT / "tokenizer.json", part / "tokenizer.json")
        if tower_config is not None:
            _write_json(part / KEPT / "config.json", facts)
        write_config(part, kind or form.kind, config)
    return Conversion(
        format=name,
        kind=kind or form.kind,
        tensors=len(done),
        size=sum(fact.size for fact in done.values()),
        left_out=(*buffers, *copies, *(n for key in table for n in key.names if n not in taken)),
        unknown=tuple(unknown_fields(name, facts)),
    )


def _read_config(path: Path, form: Format, facts: Mapping[str, Any]) -> InternVLConfig:
    try:
        config = form.read(facts)
        config.check(form.kind)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def _table(
    form: Format, config: InternVLConfig, files: TensorFiles
) -> tuple[list[Key], dict[str, str]]:
    """Every tensor that a file has to hold, by its names there; and the tied heads that it stores
    beside the embeddings that they are copies of."""
    found = adapters(config, form.kind)
    base_layer = any(BASE_LAYER in n for n in files.facts)

    def named(config: InternVLConfig) -> list[Key]:
        keys = list(peft_keys(form.keys(config, form.kind), found, base_layer=base_layer))
        return by_names_of(files.facts, keys, form.other_names)

    table = named(config)
    heads = stored_heads(table, named(untied(config)))
    copies = {h: e for h, e in heads.items() if h in files.facts and e in files.facts}
    return from_heads(files.facts, table, heads), copies


def _defaults(taken: Mapping[str, Any]) -> str:
    """What may be the reason where tensors do not fit a config that leaves sizes out."""
    if not taken:
        return ""
    said = ", ".join(f"{name} = {value}" for name, value in taken.items())
    return f"config.json does not say these, for which the official defaults were taken: {said}"


def check_format(format: str) -> None:
    """Raises ModelError if there is no such format."""
    if format not in FORMATS:
        raise ModelError(f"format {format!r} does not exist; known: {', '.join(FORMATS)}")


def export_model(folder: str | Path, target: str | Path, format: str) -> Conversion:
    """Write a model folder in a format of `FORMATS`, in the types the weights have.

    Adapters are folded into the weights that they are beside. The bias of a model that learnt by
    the sigmoid loss is left out: no format has a place for it, and in what they hold, cosines and
    softmaxes of logits, it cancels.

    What was imported and is exported in the format it came in gives the same tensors and the
    same small files.

    Raises:
        ModelError: the format cannot hold the model, with the reason, or a weight of the folder
            is missing, surplus or of another shape.
    """
    folder, target = Path(folder), Path(target)
    check_format(format)
    kind, config = read_config(folder)
    _refuse_unless_held(folder, kind, format)
    found = adapters(config, kind)
    config = config.with_lora() if found else config
    table = list(FORMATS[format].keys(config, kind))
    facts, kept = _official_config(folder, config, kind, format), _kept_config(folder)
    refuse_overwriting(target)
    with TensorFiles(folder / "weights.safetensors") as files, new_folder(target) as part:
        merged = MergedFiles(files, found)
        there = {n: fact.shape for n, fact in merged.facts.items()}
        left_out = tuple(name for name in ("logit_bias",) if there.pop(name, None) is not None)
        check_names(str(folder), there, {key.ours: key.shape for key in table})
        write = _export_pytorch if format in PYTORCH_FILES else _export_tensors
        done = write(merged, table, part)
        if (folder / KEPT).is_dir():
            _keep(small_files(folder / KEPT), part)
        if kept is None or kept[0] != format:
            facts = dict(facts or {})
            write_companions(folder, part, format, kind, config, facts)
        elif format == "transformers" and pictures_told(folder / KEPT) != config.pictures:
            _write_json(part / PICTURES, tiles(config))
        if facts is not None:
            _write_json(part / "config.json", facts)
    size = sum(fact.size for fact in done.values())
    return Conversion(
        format=format,
        kind=kind,
        tensors=len(done),
        size=size,
        left_out=left_out,
        note=unlike_ours(format, config),
    )


def merge_model(folder: str | Path, target: str | Path) -> int:
    """Make a model folder whose weights have the adapters of another folded in.

    Returns:
        How many weights changed.

    Raises:
        ModelError: the model has no adapters, or they are not those that its config describes.
    """
    folder, target = Path(folder), Path(target)
    refuse_overwriting(target)
    kind, config = read_config(folder)
    found = adapters(config, kind)
    if not found:
        raise ModelError(f"{folder} has no adapters: there is nothing to merge")
    with TensorFiles(folder / "weights.safetensors") as files, new_folder(target) as part:
        merged = MergedFiles(files, found)
        tensors = ((name, merged.read(name)) for name in merged.facts)
        write_tensors(part / "weights.safetensors", merged.facts, tensors)
        if (folder / "tokenizer.json").is_file():
            shutil.copyfile(folder / "tokenizer.json", part / "tokenizer.json")
        if (folder / KEPT).is_dir():
            _keep(small_files(folder / KEPT), part / KEPT)
        write_config(part, kind, config.with_lora())
    return len(found)


def _recognise(path: Path, inside: Path | None = None) -> tuple[str, dict[str, Any]]:
    """The format of a folder with that config.json, and what the file says."""
    if not os.path.lexists(path):
        raise ModelError(
            f"{path} does not exist; an official model folder has one, and to a PyTorch file it "
            "is given"
        )
    facts = read_mapping(path, inside)
    languages = [part for part in sorted(set(LANGUAGE.values())) if part and facts.get(part)]
    if len(languages) > 1:
        raise ModelError(
            f"{path} has {' and '.join(languages)}, expected one of them: each class reads its own "
            "language model from there; delete those that the weights are not of"
        )
    if "qllama_config" in facts:
        return "internvl_14b", facts
    if "llm_config" in facts:
        return "internvl_chat", facts
    if facts.get("model_type") == "internvl" and "text_config" in facts:
        return "transformers", facts
    if facts.get("model_type") == "intern_vit_6b":
        return "internvit", facts
    if facts.get("model_type") == "llava":
        full = facts.get("mm_projector_type") == "two_mlp"
        return "llava_full" if full else "llava", facts
    known = "; ".join(form.about for form in FORMATS.values())
    raise ModelError(
        f"{path} has model_type {shown(facts.get('model_type'))}; what is read: {known}"
    )


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _as_pytorch_file(name: str, config_file: Path) -> str:
    names = {"internvit": "internvit_pth", "internvl_14b": "internvl_c_pth"}
    if name not in names:
        raise ModelError(
            f"{config_file} is that of {FORMATS[name].about}, which is a folder; for a PyTorch "
            "file the config of an InternViT or of an InternVL-14B is expected"
        )
    return names[name]


def _require_part(held: str, kind: str | None) -> None:
    """Raises ModelError if a model of one kind cannot be had from another."""
    if kind in (None, held):
        return
    if kind not in SOLO or not PARTS[kind] <= PARTS[held]:
        raise ModelError(
            f"a {kind} cannot be had from the source, which is a {held}; of that can be had: "
            f"{', '.join(k for k in (*SOLO, held) if PARTS[k] <= PARTS[held])}"
        )


def _chosen(
    whole: Sequence[Key], config: InternVLConfig, held: str, kind: str | None
) -> Sequence[Key]:
    """The part of a table that makes a model of another kind."""
    if kind is None or kind == held:
        return whole
    ours = {key.ours for key in hf.keys(config, kind)}
    ours |= {key.ours for p in adapters(config, kind).values() for key in (p.a, p.b)}
    return [key for key in whole if key.ours in ours]


def _refuse_unless_held(folder: Path, kind: str, format: str) -> None:
    held = FORMATS[format].kind
    if kind == held:
        return
    lacking = sorted(PARTS[held] - PARTS[kind])
    losing = sorted(PARTS[kind] - PARTS[held])
    reasons = [f"the model lacks {', '.join(lacking)}"] if lacking else []
    reasons += [f"the format has no place for {', '.join(losing)}"] if losing else []
    fitting = [name for name, form in FORMATS.items() if form.kind == kind]
    advice = f"formats for a {kind}: {', '.join(fitting)}" if fitting else f"none holds a {kind}"
    raise ModelError(
        f"{folder} is a {kind} and cannot be written as {FORMATS[format].about}: "
        f"{'; '.join(reasons)}; {advice}"
    )


def _import_tensors(files: TensorFiles, table: Sequence[Key], path: Path) -> dict[str, TensorFacts]:
    facts = {}
    for key in table:
        dtypes = {files.facts[name].dtype for name in key.names}
        if len(dtypes) > 1:
            types = (f"{n} is {files.facts[n].dtype}" for n in key.names)
            raise ModelError(
                f"{files.label}: {', '.join(types)}; expected one type, for they are one matrix "
                "here: save the model in one type, such as bfloat16"
            )
        facts[key.ours] = TensorFacts(shape=key.shape, dtype=dtypes.pop())
    facts = _aligned(facts)
    keys = {key.ours: key for key in table}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in facts:
            theirs = {n: files.read(n) for n in keys[name].names}
            for official, tensor in theirs.items():
                require_finite(official, files.label, tensor)
            yield name, keys[name].join(list(theirs.values()))

    write_tensors(path, facts, tensors())
    return facts


def _export_pytorch(
    files: MergedFiles, table: Sequence[Key], target: Path
) -> dict[str, TensorFacts]:
    """One PyTorch file; unlike safetensors it has to be whole in memory first."""
    import torch

    tensors = {
        name: part.clone()
        for key in table
        for name, part in zip(key.names, key.split(files.read(key.ours)), strict=True)
    }
    target.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, target / "model.pth")
    return {n: TensorFacts(shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()}


def _export_tensors(
    files: MergedFiles, table: Sequence[Key], target: Path
) -> dict[str, TensorFacts]:
    table = sorted(table, key=lambda key: -files.facts[key.ours].dtype.itemsize)
    facts = {
        name: TensorFacts(shape=shape, dtype=files.facts[key.ours].dtype)
        for key in table
        for name, shape in key.theirs
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key in table:
            yield from zip(key.names, key.split(files.read(key.ours)), strict=True)

    write_tensors(target / "model.safetensors", facts, tensors(), {"format": "pt"})
    return facts


def _aligned(facts: Mapping[str, TensorFacts]) -> dict[str, TensorFacts]:
    """By name, the widest types first: each tensor then begins at a multiple of its type's size."""
    return dict(sorted(facts.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0])))


def _keep(files: Iterable[Path], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, target / path.name)


def _official_config(
    folder: Path, config: InternVLConfig, kind: str, format: str
) -> dict[str, Any] | None:
    """The config.json to write; None: the one that was kept says the same."""
    kept = _kept_config(folder)
    if kept is not None and kept[0] == format:
        merged = kept[1] | {name: 0 for name in hf.LORA_RANKS if kept[1].get(name)}
        read = FORMATS[format].read(merged)
        if format == "transformers":  # which says it elsewhere
            read = dataclasses.replace(read, pictures=config.pictures)
        if read == config:
            return None if merged == kept[1] else merged
    if format == "transformers":
        return hf.config_to_native(config, _image_token(folder, kept[1] if kept else {}))
    if format in ("llava", "llava_full"):
        return hf.config_to_llava(config, kind)
    facts = hf.config_to_official(config, kind)
    template = template_name(kept[1]) if kept and kind == "chat_simple" else None
    return facts | {"template": template} if template else facts


def _kept_config(folder: Path) -> tuple[str, dict[str, Any]] | None:
    path = folder / KEPT / "config.json"
    return _recognise(path) if path.is_file() else None


def _image_token(folder: Path, kept: Mapping[str, Any]) -> int:
    """Id of the token in whose places the visual tokens go."""
    for field in ("img_context_token_id", "image_token_id"):
        if field in kept:
            return kept[field]
    path = folder / KEPT / "added_tokens.json"
    if path.is_file():
        added = read_mapping(path)
        if IMG_CONTEXT in added:
            return added[IMG_CONTEXT]
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    if isinstance(tokenizer, Tokenizer):
        return IMG_CONTEXT_ID
    if isinstance(tokenizer, OfficialTokenizer) and IMG_CONTEXT in tokenizer.special:
        return tokenizer.special[IMG_CONTEXT]
    raise ModelError(
        f"nothing in {folder} says the id of {IMG_CONTEXT}, which transformers' config needs; "
        f"expected it in {KEPT}/config.json (img_context_token_id) or the tokenizer files there"
    )
