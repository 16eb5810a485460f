"""Which samples of a step share a sequence.

The samples of one step are packed among themselves. So a step learns from the same samples packed
or not, its packs follow from (seed, global index) alone, and there is nothing to save: InternVL
2.5's packer carries a buffer of open packs from step to step instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from vlfoundry.infra.core.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How large a pack may be. The defaults are those of InternVL 2.5."""

    max_tokens: int = 16384
    """most tokens of a pack, visual ones included (max_packed_tokens)"""
    max_tiles: int = 48
    """most tiles of a pack (num_images_expected)"""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_tiles"):
            if getattr(self, name) < 1:
                raise ConfigError(f"packing.{name} is {getattr(self, name)}, expected 1 or more")


def pack(
    tokens: Sequence[int], tiles: Sequence[int], config: PackingConfig, *, multiple: int = 1
) -> list[list[int]]:
    """Deal samples out to packs of about equal length.

    Longest first, each to the shortest pack that has room; one round of packs more if some sample
    finds none. Equal packs keep data-parallel ranks equally busy, and since a pack is not filled
    up, its cost is that of what it holds.

    Args:
        tokens, tiles: of each sample.
        config: how much a pack holds.
        multiple: the number of packs is a multiple of it, such as of the data-parallel ranks
            times the micro-batches of a round.

    Returns:
        Indices of the samples of each pack, ascending; none is empty.

    Raises:
        DataError: a sample is larger than a pack, or there are fewer samples than packs.
    """
    for i, (length, pictures) in enumerate(zip(tokens, tiles, strict=True)):
        if length > config.max_tokens or pictures > config.max_tiles:
            raise DataError(
                f"sample {i} of the step has {length} tokens and {pictures} tiles, more than a "
                f"pack of {config.max_tokens} tokens and {config.max_tiles} tiles holds; cut it, "
                "or raise packing.max_tokens or packing.max_tiles"
            )
    least = max(-(-sum(tokens) // config.max_tokens), -(-sum(tiles) // config.max_tiles), 1)
    count = -(-least // multiple) * multiple
    while count <= len(tokens):
        packs = _deal(tokens, tiles, config, count)
        if packs is not None:
            return packs
        count += multiple
    raise DataError(
        f"{len(tokens)} samples of a step cannot fill {count} packs; "
        f"give a step at least {multiple} samples"
    )


def _deal(
    tokens: Sequence[int], tiles: Sequence[int], config: PackingConfig, count: int
) -> list[list[int]] | None:
    """Exactly `count` packs; None if some sample finds no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    shortest_first = [(0, number, 0) for number in range(count)]  # tokens, pack, tiles
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        passed = []
        while shortest_first:
            length, number, pictures = heapq.heappop(shortest_first)
            if length + tokens[i] > config.max_tokens:
                return None  # nor has any longer one
            if pictures + tiles[i] <= config.max_tiles:
                packs[number].append(i)
                heapq.heappush(shortest_first, (length + tokens[i], number, pictures + tiles[i]))
                break
            passed.append((length, number, pictures))
        else:
            return None
        for entry in passed:
            heapq.heappush(shortest_first, entry)
    return [sorted(members) for members in packs]
