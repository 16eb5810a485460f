"""Canonical weights: whole tensors by name, the same whatever the parallel layout.

Names, offsets and whole shapes come from the model's own `sharded_state_dict`. A tensor that is
padded for tensor parallelism says its real shape in an attribute `true_shape` of the parameter.
Every layer has a name of its own (`vision.decoder.layers.3.mlp.linear_fc1.weight`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.backend.parallel import SoloGroup
from vlfoundry.infra.core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What this rank holds of one canonical tensor."""

    name: str
    """canonical name"""
    shape: tuple[int, ...]
    """of the whole tensor, without padding"""
    offset: tuple[int, ...]
    """of this piece in the whole"""
    size: tuple[int, ...]
    """of the part of this piece that is real; the rest is padding"""
    data: Any
    """the local tensor; shares memory with the parameter"""
    is_main: bool
    """False where another rank holds the same piece and speaks for it"""

    @property
    def real(self) -> Tensor:
        """The local tensor without padding."""
        return self.data[tuple(slice(0, size) for size in self.size)]

    @property
    def place(self) -> tuple[slice, ...]:
        """Where `real` lies in the whole."""
        return tuple(
            slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True)
        )


def pieces(model: Any) -> Iterator[Piece]:
    """Everything this rank holds of the model's weights."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        apply_factories,
        is_main_replica,
    )

    group = (
        parallel_state.get_data_parallel_group(with_context_parallel=True)
        if parallel_state.is_initialized()
        else SoloGroup()
    )
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
    true_shapes = {
        sharded.key: tuple(sharded.data.true_shape)
        for sharded in nested_values(state)
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory)
        and hasattr(sharded.data, "true_shape")
    }
    apply_factories(state)
    for sharded in nested_values(state):
        if not isinstance(sharded, ShardedTensor):
            continue  # Transformer Engine's extra state: no weight
        assert not sharded.prepend_axis_num, f"{sharded.key}: layers share a name"
        assert sharded.data is not None, f"{sharded.key}: it has no tensor here"
        shape = true_shapes.get(sharded.key, tuple(sharded.global_shape))
        offset = tuple(sharded.global_offset)
        yield Piece(
            name=sharded.key,
            shape=shape,
            offset=offset,
            size=tuple(
                min(local, max(0, whole - start))
                for local, whole, start in zip(sharded.local_shape, shape, offset, strict=True)
            ),
            data=sharded.data.detach(),
            is_main=is_main_replica(sharded.replica_id),
        )


def gather_weights(model: Any) -> dict[str, Tensor] | None:
    """Whole tensors in fp32 on the CPU, by canonical name: on rank 0; None on the others.

    Every rank must call it.
    """
    import torch

    mine = [piece for piece in pieces(model) if piece.is_main]
    plans, send, receive = _exchange(mine)
    if plans is None:
        for piece in mine:
            send(piece.real)
        return None
    whole: dict[str, Tensor] = {}
    for rank, plan in enumerate(plans):
        for index, (name, shape, place) in enumerate(plan):
            target = whole.setdefault(name, torch.zeros(shape, dtype=torch.float32))
            part = mine[index].real if rank == 0 else receive(rank, target[place].shape)
            target[place] = part
    return dict(sorted(whole.items()))


def _exchange(mine: list[Piece]) -> tuple[list | None, Any, Any]:
    """What each rank will send (on rank 0, else None), and how to send and receive a tensor."""
    import torch
    import torch.distributed as dist

    plan = [(piece.name, piece.shape, piece.place) for piece in mine]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [plan], None, None
    first = dist.get_rank() == 0
    plans = [None] * dist.get_world_size() if first else None
    dist.gather_object(plan, plans)
    device = mine[0].data.device if mine else torch.device("cpu")

    def send(part: Tensor) -> None:
        dist.send(part.to(torch.float32).contiguous(), dst=0)

    def receive(rank: int, shape: tuple[int, ...]) -> Tensor:
        part = torch.empty(shape, dtype=torch.float32, device=device)
        dist.recv(part, src=rank)
        return part.cpu()

    return plans, send, receive


def load_weights(
    model: Any,
    source: str | Path | Mapping[str, Tensor],
    prefix: str = "",
    strict: bool = True,
) -> None:
    """Fill the model from canonical weights; each rank reads its own part.

    Args:
        model: in any layout.
        source: a safetensors file, or whole tensors by name.
        prefix: what stands before the model's names in the source, e.g. "vision.".
        strict: whether the source may hold nothing else under the prefix.

    Raises:
        ModelError: a weight is missing, of another shape, or belongs to no parameter.
    """
    import torch

    with _open(source) as weights, torch.no_grad():
        known = set()
        for piece in pieces(model):
            name = prefix + piece.name
            known.add(name)
            shape = weights.shape(name)
            if shape is None:
                raise ModelError(
                    f"weight {name!r} is missing in {weights.label}; expected shape "
                    f"{list(piece.shape)}; these are the weights of another model"
                )
            if shape != piece.shape:
                raise ModelError(
                    f"weight {name!r} in {weights.label} has shape {list(shape)}; the model's "
                    f"config asks for {list(piece.shape)}"
                )
            piece.data.zero_()
            piece.real.copy_(weights.read(name, piece.place))
        known = _known_to_any_rank(known)
        surplus = sorted(n for n in weights.names() if n.startswith(prefix) and n not in known)
        if strict and surplus:
            raise ModelError(
                f"{len(surplus)} weights in {weights.label} belong to no parameter of the model, "
                f"the first is {surplus[0]!r}; these are the weights of another model"
            )


def _known_to_any_rank(names: set[str]) -> set[str]:
    """A stage of a pipeline holds part of the model."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return names
    every: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(every, names)
    return set().union(*every)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write fp32 tensors so that equal tensors give equal bytes (sorted names, sorted metadata).

    The safetensors library orders its metadata by a hash that differs from run to run, hence the
    header is made here: 8 bytes of its length, JSON, then the tensors in C order.
    """
    import torch

    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in sorted(tensors):
        end = start + 4 * tensors[name].numel()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
            stream.write(tensor.numpy().tobytes())
    unfinished.replace(path)


class _FileWeights:
    """A safetensors file, of which only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        if not path.is_file():
            raise ModelError(f"weights {path} do not exist")
        self.label = str(path)
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def __enter__(self) -> _FileWeights:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._file.get_slice(name).get_shape()) if name in self._names else None

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        # A scalar cannot be sliced.
        return self._file.get_slice(name)[place] if place else self._file.get_tensor(name)


class _DictWeights:
    """Whole tensors in memory."""

    label = "the given weights"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> _DictWeights:
        return self

    def __exit__(self, *_error: Any) -> None:
        pass

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        return self._tensors[name][place]


def _open(source: str | Path | Mapping[str, Tensor]) -> _FileWeights | _DictWeights:
    return _DictWeights(source) if isinstance(source, Mapping) else _FileWeights(Path(source))
