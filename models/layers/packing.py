"""Several samples one behind another in a batch of one row.

Where they are, a mask is `cu_seqlens`, int32 [P+1]: the place where each begins, and where the last
ends. No token sees another sample. (A tensor, and not Megatron's PackedSeqParams: recompute hands
masks on as tensors, and Megatron's own core attention refuses packed sequences without Transformer
Engine.)

Letters: P packed samples, K packs, B batch, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlfoundry.infra.core.errors import ModelError


def is_packed(mask: Tensor | None) -> bool:
    """Whether a mask is `cu_seqlens`."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 1


def pack_rows(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padded rows [B, T], mask [B, T] -> the same one behind another [1, T'], and cu_seqlens."""
    ends = mask.sum(1).cumsum(0)
    return ids[mask.bool()][None], torch.cat([ends.new_zeros(1), ends]).int()


def sample_of_token(cu_seqlens: Tensor) -> Tensor:
    """Which packed sample each token belongs to: int64 [T]."""
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def packed_positions(cu_seqlens: Tensor, batch: int, tokens: int) -> Tensor:
    """Positions [1, T] that begin at 0 in each packed sample.

    Raises:
        ModelError: the samples are not one row of that many tokens.
    """
    if batch != 1 or int(cu_seqlens[-1]) != tokens:
        raise ModelError(
            f"cu_seqlens ends at {int(cu_seqlens[-1])} for {batch} rows of {tokens} tokens; "
            "expected one row that ends there"
        )
    places = torch.arange(tokens, device=cu_seqlens.device)
    return (places - cu_seqlens[sample_of_token(cu_seqlens)])[None]


def split_packs(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The packs of a batch, one by one: micro-batches of one row each.

    The batch holds `cu_seqlens` [P+1] and tensors [1, T] such as `ids`. `packs` [K] says how many
    samples each pack has (all are one pack if it is missing), `tiles` [P] how many `pixels` (and
    numbers `samples` of them, where drop path asks for these) each sample has. All else goes into
    every micro-batch.
    """
    cu_seqlens, tiles = batch["cu_seqlens"], batch.get("tiles")
    ends = _ends(batch["packs"]) if "packs" in batch else [0, len(cu_seqlens) - 1]
    seen = _ends(tiles) if tiles is not None else []
    length = int(cu_seqlens[-1])
    for first, last in itertools.pairwise(ends):
        row = slice(int(cu_seqlens[first]), int(cu_seqlens[last]))
        part = {
            name: value[:, row] if _is_row(value, length) else value
            for name, value in batch.items()
        }
        part["cu_seqlens"] = cu_seqlens[first : last + 1] - row.start
        part["packs"] = cu_seqlens.new_tensor([last - first])
        if tiles is not None:
            part["tiles"] = tiles[first:last]
            images = slice(seen[first], seen[last])
            part |= {name: batch[name][images] for name in ("pixels", "samples") if name in batch}
        yield part


def _is_row(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (1, length)


def _ends(counts: Tensor) -> list[int]:
    return [0, *counts.cumsum(0).tolist()]
