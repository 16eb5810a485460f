"""What an official file holds beside the one table of names: other names, copies, buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.core.givenfiles import brief
from vlfoundry.infra.core.tensorfiles import TensorFiles
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.hf_fields import DEPTH, TOWERS
from vlfoundry.models.official.fields import label
from vlfoundry.models.official.keymap import Key, renamed

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 24
"""elements that are looked at together"""


def require_layers(format: str, kind: str, config: InternVLConfig, files: TensorFiles) -> None:
    """Refuse more layers than a file has tensors, before their names are made.

    Raises:
        ConfigError: names the field of config.json.
    """
    for tower, depth in config.depths(kind).items():
        if depth > len(files.facts):
            raise ConfigError(
                f"{label(TOWERS[format][tower], DEPTH)} is {depth}, expected at most "
                f"{len(files.facts)}, for {files.label} has no more tensors"
            )


_ADAPTED = {"use_backbone_lora": "vision_model.", "use_llm_lora": "language_model."}
"""fields of a chat model's config.json, and how the names of the tower begin"""


def require_adapters(format: str, facts: Mapping, files: TensorFiles) -> None:
    """Refuse ranks of adapters where there are none, before every linear's are missed by name.

    Raises:
        ConfigError: names the field of config.json.
    """
    for field, tower in _ADAPTED.items():
        rank = facts.get(field) if format == "internvl_chat" else 0
        if rank and not any(n.startswith(tower) and ".lora_" in n for n in files.facts):
            raise ConfigError(
                f"{field} is {rank}, but the weights in {files.label} have no adapters there, "
                "expected 0; set it to 0 if they are merged into the weights"
            )


def by_names_of(
    found: Collection[str], table: Sequence[Key], others: Sequence[Callable[[str], str]]
) -> list[Key]:
    """A table by the names that a file has, where its tensors have several names in use.

    Args:
        found: names in the file.
        table: by the names that are written here.
        others: from each of these names to what else a tensor is called.
    """
    tables = [list(table), *(list(renamed(table, other)) for other in others)]
    return max(tables, key=lambda keys: sum(name in found for key in keys for name in key.names))


def from_heads(found: Collection[str], table: Sequence[Key], heads: Mapping[str, str]) -> list[Key]:
    """A table in which an embedding that a file stores as its tied head alone has that name."""
    stored = {e: h for h, e in heads.items() if e not in found and h in found}
    return list(renamed(table, lambda name: stored.get(name, name)))


def untied(config: InternVLConfig) -> InternVLConfig:
    """The same model with heads of their own."""
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, tied_head=False),
        language=dataclasses.replace(config.chat, tied_head=False),
    )


def stored_heads(table: Iterable[Key], with_heads: Iterable[Key]) -> dict[str, str]:
    """Official names of tied heads that a file may hold, and of the embeddings they are copies of.

    Args:
        table: of the model.
        with_heads: of the same model where its heads are not tied.
    """
    ours = {key.ours: key for key in table}
    return {
        key.names[0]: ours[f"{key.ours.removesuffix('head.weight')}embedding.weight"].names[0]
        for key in with_heads
        if key.ours not in ours and key.ours.endswith(".head.weight")
    }


def refuse_unequal(files: TensorFiles, copies: Mapping[str, str]) -> None:
    """Raises ModelError if a tied head that is stored is not equal to the embedding."""
    import torch

    for head, embedding in copies.items():
        pair = [files.read(name) for name in (head, embedding)]
        wide = torch.promote_types(pair[0].dtype, pair[1].dtype)
        if not torch.equal(*(tensor.to(wide) for tensor in pair)):
            raise ModelError(
                f"{head!r} of {files.label} is not equal to {embedding!r}, but config.json says "
                "that they are one matrix (tie_word_embeddings is true); set it to false if the "
                "head was trained on its own"
            )


def require_finite(name: str, label: str, tensor: Tensor) -> None:
    """Raises ModelError if a weight has a value that is no finite number."""
    import torch

    for chunk in tensor.reshape(-1).split(CHUNK):
        if not chunk.numel():
            continue
        ends = torch.stack(torch.aminmax(chunk))
        if not bool(ends.isfinite().all()):
            count = int((~chunk.isfinite()).sum())
            raise ModelError(
                f"tensor {brief(name)!r} of {label} has {count} or more values that are NaN or "
                "infinite, expected finite numbers; the file is damaged, or its training diverged"
            )
