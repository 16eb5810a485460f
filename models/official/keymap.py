"""Tables of weights under our names and another's, used both ways.

A table is a sequence of `Key`, made from a config: it says every name and shape there is on both
sides, so that what a file lacks or has too much is known before a tensor is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.givenfiles import brief

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
NAMED = 20
"""how many names an error lists of each sort"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One canonical tensor and the tensors it is elsewhere.

    `join` cuts each of theirs along its rows into `blocks`, each block into `groups`, and puts
    the first group of every block first, then the second of every block, and so on. One tensor in
    one block keeps its values in their order and at most changes its shape.
    """

    ours: str
    """canonical name"""
    shape: Shape
    """canonical shape"""
    theirs: tuple[tuple[str, Shape], ...]
    """names and shapes elsewhere, in the order they are joined"""
    groups: int = 1
    """e.g. attention heads, where ours has q, k and v of a head beside each other"""
    blocks: int = 1
    """e.g. 3 where one of their tensors is all q, all k, all v"""

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name, _ in self.theirs)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Theirs, in order, as ours."""
        import torch

        if self._is_one:
            return tensors[0].reshape(self.shape)
        parts = [part for tensor in tensors for part in tensor.chunk(self.blocks)]
        rest = parts[0].shape[1:]
        grouped = [part.reshape(self.groups, -1, *rest) for part in parts]
        return torch.cat(grouped, 1).reshape(self.shape)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Ours as theirs, in order: the inverse of `join`."""
        import torch

        if self._is_one:
            return [tensor.reshape(self.theirs[0][1])]
        rest = tensor.shape[1:]
        each = self.blocks * self.groups
        sizes = [shape[0] // each for _, shape in self.theirs for _ in range(self.blocks)]
        parts = iter(tensor.reshape(self.groups, -1, *rest).split(sizes, 1))
        return [
            torch.cat([next(parts).reshape(-1, *rest) for _ in range(self.blocks)])
            for _ in self.theirs
        ]

    @property
    def _is_one(self) -> bool:
        return self.blocks == 1 and len(self.theirs) == 1


def one(ours: str, shape: Shape, name: str, their_shape: Shape | None = None) -> Key:
    """A tensor that is one tensor elsewhere, of the same values in the same order."""
    return Key(ours=ours, shape=shape, theirs=((name, their_shape or shape),))


def prefixed(keys: Iterable[Key], *, ours: str = "", theirs: str = "") -> Iterator[Key]:
    """The same keys with something in front of their names."""
    for key in renamed(keys, lambda name: theirs + name):
        yield dataclasses.replace(key, ours=ours + key.ours)


def renamed(keys: Iterable[Key], rename: Callable[[str], str]) -> Iterator[Key]:
    """The same keys with other names elsewhere."""
    for key in keys:
        theirs = tuple((rename(name), shape) for name, shape in key.theirs)
        yield dataclasses.replace(key, theirs=theirs)


def join_all(keys: Iterable[Key], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors from theirs in memory; what the keys do not name is left alone.

    Raises:
        ModelError: a tensor is missing.
    """
    import torch

    keys = tuple(keys)
    missing = [name for key in keys for name in key.names if name not in weights]
    if missing:
        raise ModelError(f"the weights lack {_list(missing)}")
    return {
        key.ours: key.join([torch.as_tensor(weights[n]) for n in key.names]).contiguous()
        for key in keys
    }


def split_all(keys: Iterable[Key], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from canonical ones in memory: the inverse of `join_all`."""
    return {
        name: part.contiguous()
        for key in keys
        for name, part in zip(key.names, key.split(weights[key.ours]), strict=True)
    }


def check_names(
    label: str, found: Mapping[str, Shape], wanted: Mapping[str, Shape], advice: str = ""
) -> None:
    """Every wanted tensor is there in its shape, and nothing else is.

    Args:
        label: where the tensors were found.
        found, wanted: shapes by name.
        advice: what to do, for the end of the message.

    Raises:
        ModelError: names what is missing, surplus or of another shape.
    """
    missing = [name for name in wanted if name not in found]
    surplus = sorted(name for name in found if name not in wanted)
    misshaped = [
        f"{brief(name)} {list(found[name])} (expected {list(shape)})"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    sorts = (("missing", missing), ("surplus", surplus), ("of another shape", misshaped))
    faults = [f"{len(names)} {sort}: {_list(names)}" for sort, names in sorts if names]
    if faults:
        text = f"{label} does not hold the weights that its config describes; {'; '.join(faults)}"
        raise ModelError(f"{text}; {advice}" if advice else text)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(brief, names[:NAMED])) + more
