"""Adapters of a whole model by name: beside which weights, folding them in, and PEFT's names.

Official chat folders that were fine-tuned with LoRA and not merged have PEFT's names: a wrapped
tower's begin with `language_model.base_model.model.`, and beside an adapted linear stand
`lora_A.default.weight` and `lora_B.default.weight`; since PEFT 0.6 its own tensors are below
`base_layer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlfoundry.infra.core.tensorfiles import TensorFacts, TensorFiles
from vlfoundry.models.decoder.hf_keys import decoder_keys
from vlfoundry.models.internvit import hf as vision_hf
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.layers.config import LINEARS, LoraConfig
from vlfoundry.models.official.keymap import Key, check_names, prefixed

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = ".lora."
"""in the names of adapters"""
BASE_LAYER = ".base_layer."
"""in PEFT's names of an adapted linear's own tensors"""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The adapters of one linear."""

    weight: Key
    """of the linear; its tensors elsewhere have one pair each"""
    a: Key
    b: Key
    scale: float
    """of B A"""

    def merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The weight with its adapters folded in: computed in fp32, in the weight's type."""
        deltas = [
            right.float() @ left.float()
            for left, right in zip(self.a.split(a), self.b.split(b), strict=True)
        ]
        delta = self.weight.join(deltas).mul_(self.scale)
        return delta.add_(weight.float()).to(weight.dtype)


def adapters(config: InternVLConfig, kind: str) -> dict[str, Pairs]:
    """The adapters that a model has, by the canonical names of the weights they are beside."""
    towers = {
        "vision": ("vision_model.", vision_hf.keys(config.vision)),
        "text": ("qllama.", decoder_keys(config.text)),
        "language": ("language_model.", decoder_keys(config.chat)),
    }
    found = {}
    for tower, (official, keys) in towers.items():
        lora = config.lora_of(tower)
        if lora is None or tower not in PARTS[kind]:
            continue
        ends = tuple(f".{LINEARS[name]}.weight" for name in lora.linears)
        for key in prefixed(keys, ours=f"{tower}.", theirs=official):
            if key.ours.endswith(ends):
                found[key.ours] = _pairs(key, lora)
    return found


def peft_keys(
    table: Iterable[Key], found: Mapping[str, Pairs], *, base_layer: bool
) -> Iterator[Key]:
    """The official names of a chat model as PEFT leaves them.

    Args:
        table: names and shapes without adapters.
        found: the model's adapters.
        base_layer: whether an adapted linear's own tensors are below `base_layer`.
    """
    towers = {name.split(".")[0] for name in found}
    for key in table:
        if key.ours.split(".")[0] not in towers:
            yield key
            continue
        is_adapted = f"{key.ours.rpartition('.')[0]}.weight" in found
        layer = BASE_LAYER if base_layer and is_adapted else "."
        theirs = tuple((_peft_name(name, layer), shape) for name, shape in key.theirs)
        yield dataclasses.replace(key, theirs=theirs)
    for pairs in found.values():
        yield from (pairs.a, pairs.b)


class MergedFiles:
    """Weights of a model folder, adapters folded in as they are read.

    Raises:
        ModelError: an adapter is missing, surplus or of another shape.
    """

    def __init__(self, files: TensorFiles, found: Mapping[str, Pairs]) -> None:
        self._files, self._found = files, found
        there = {n: fact.shape for n, fact in files.facts.items() if ADAPTER in n}
        wanted = {key.ours: key.shape for pairs in found.values() for key in (pairs.a, pairs.b)}
        check_names(files.label, there, wanted)
        self.facts: dict[str, TensorFacts] = {
            name: fact for name, fact in files.facts.items() if name not in there
        }

    def read(self, name: str) -> Tensor:
        """A tensor; it may share memory with the mapped file."""
        import torch

        weight, pairs = self._files.read(name), self._found.get(name)
        if pairs is None:
            return weight
        with torch.no_grad():
            a, b = (self._files.read(key.ours) for key in (pairs.a, pairs.b))
            return pairs.merged(weight, a, b)


def _pairs(key: Key, lora: LoraConfig) -> Pairs:
    linear = key.ours.removesuffix("weight")
    theirs = [(_peft_name(name, ".").removesuffix("weight"), shape) for name, shape in key.theirs]
    outputs, inputs = key.shape
    return Pairs(
        weight=key,
        a=Key(
            ours=f"{linear}lora.a",
            shape=(len(theirs) * lora.rank, inputs),
            theirs=tuple((f"{n}lora_A.default.weight", (lora.rank, inputs)) for n, _ in theirs),
        ),
        b=dataclasses.replace(
            key,
            ours=f"{linear}lora.b",
            shape=(outputs, lora.rank),
            theirs=tuple(
                (f"{n}lora_B.default.weight", (rows, lora.rank)) for n, (rows, _) in theirs
            ),
        ),
        scale=lora.scale,
    )


def _peft_name(official: str, layer: str) -> str:
    """`layer` stands between a module and its tensor: "." or `BASE_LAYER`."""
    tower, rest = official.split(".", 1)
    module, _, leaf = rest.rpartition(".")
    return f"{tower}.base_model.model.{module}{layer}{leaf}"
