"""Files of tensors, read and written tensor by tensor.

A file is mapped into memory, not read: what is held beyond the page cache is the tensor in hand.
PyTorch's files are read with `weights_only`: code in a pickle is never run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.givenfiles import brief, check_file, is_file_name, read_mapping, shown

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = ("model.safetensors", "pytorch_model.bin", "weights.safetensors")
"""what the one file of weights of a folder is called, in the order they are looked for"""
WRAPPERS = ("module", "model", "state_dict")
"""what a PyTorch file may hold its tensors under"""
_BROKEN_PICKLE = (
    pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, AssertionError,
    TypeError, AttributeError, OverflowError, MemoryError, struct.error, OSError,
)  # fmt: skip
"""what PyTorch's unpickler raises on files that are cut, invented or of something else"""
_CODE = re.compile(
    r"(?:GLOBAL|unrecognized function|`add_safe_globals`,? but got) (<[^>]*>|[^\s<]+)"
)
"""in a refusal of PyTorch's: what a file would have called"""
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    """sizes"""
    dtype: Any
    """torch.dtype"""

    @property
    def size(self) -> int:
        """Bytes."""
        count = self.dtype.itemsize
        for side in self.shape:
            count *= side
        return count


class TensorFiles:
    """The tensors of a file, or of all shards of a folder; a context manager.

    Raises:
        ModelError: there are none, a shard is missing or unreadable, or a name comes twice.
    """

    def __init__(self, source: str | Path, *, inside: Path | None = None) -> None:
        """
        Args:
            source: a file or a folder.
            inside: the folder that no link may lead out of; None: links are followed.
        """
        self.label, self._inside = str(source), inside
        self._open = ExitStack()
        self._file_of: dict[str, Any] = {}
        self.facts: dict[str, TensorFacts] = {}
        paths, promised = _shards(Path(source), inside)
        for path in paths:
            self._add(path)
        absent = sorted(promised - self.facts.keys())
        if absent:
            raise ModelError(
                f"the index of {source} promises {len(absent)} tensors that no shard holds, the "
                f"first is {brief(absent[0])!r}; download the shards again"
            )

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_error: Any) -> None:
        self._open.close()

    def read(self, name: str) -> Tensor:
        """A tensor; it may share memory with the mapped file."""
        return self._file_of[name].read(name)

    def _add(self, path: Path) -> None:
        check_file(path, self._inside)
        file = _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)
        self._open.callback(file.close)
        for name, facts in file.facts():
            if name in self.facts:
                raise ModelError(
                    f"tensor {brief(name)!r} of {self.label} comes again in {path.name}"
                )
            self.facts[name], self._file_of[name] = facts, file


def write_tensors(
    path: str | Path,
    facts: Mapping[str, TensorFacts],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file: the header first, then each tensor as it comes.

    Args:
        path: takes its name only when it is complete.
        facts: every tensor, in the order of the file.
        tensors: the same names in the same order.
        metadata: strings for the header.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    names = {getattr(torch, theirs): ours for ours, theirs in _TYPES.items()}
    start = 0
    for name, fact in facts.items():
        if fact.dtype not in names:
            raise ModelError(f"{name!r} is of type {fact.dtype}; weights are of {sorted(_TYPES)}")
        offsets = [start, start + fact.size]
        header[name] = {
            "dtype": names[fact.dtype], "shape": list(fact.shape), "data_offsets": offsets
        }  # fmt: skip
        start += fact.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for (name, fact), (given, tensor) in zip(facts.items(), tensors, strict=True):
            assert (name, fact.shape, fact.dtype) == (given, tuple(tensor.shape), tensor.dtype)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
    unfinished.replace(path)


class _Safetensors:
    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            reason = brief(str(error), 200)
            raise ModelError(
                f"{path} is no complete safetensors file: {reason}; download it again"
            ) from None
        self._path = path

    def facts(self) -> Iterator[tuple[str, TensorFacts]]:
        import torch

        for name in self._file.keys():  # noqa: SIM118 (it is no mapping)
            part = self._file.get_slice(name)
            if part.get_dtype() not in _TYPES:
                raise ModelError(
                    f"tensor {brief(name)!r} of {self._path} is of type {part.get_dtype()}; "
                    f"weights are of {sorted(_TYPES)}"
                )
            dtype = getattr(torch, _TYPES[part.get_dtype()])
            yield name, TensorFacts(shape=tuple(part.get_shape()), dtype=dtype)

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class _Pickle:
    def __init__(self, path: Path) -> None:
        found = _unpickled(path)
        for wrapper in WRAPPERS:
            if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
                found = found[wrapper]
        if not isinstance(found, Mapping):
            raise ModelError(f"{path} holds a {type(found).__name__}, expected tensors by name")
        for name, tensor in found.items():
            _refuse_unreadable(path, name, tensor)
        self._tensors: dict[str, Tensor] = dict(found)

    def facts(self) -> Iterator[tuple[str, TensorFacts]]:
        for name, tensor in self._tensors.items():
            yield name, TensorFacts(shape=tuple(tensor.shape), dtype=tensor.dtype)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors.clear()


def _unpickled(path: Path) -> Any:
    """What a PyTorch file holds. Its old format, which is no archive, cannot be mapped."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols; what is wrong ends in an error
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _BROKEN_PICKLE as error:
        raise _unread(path, str(error)) from None


def _unread(path: Path, told: str) -> ModelError:
    """What is wrong with a PyTorch file, without the advice of PyTorch to run what is in it."""
    code = _CODE.search(told)
    advice = "get the model in safetensors files, or a file of its state_dict alone"
    if code:
        return ModelError(
            f"{path} holds code ({brief(code[1])}) and cannot be read as tensors alone, without "
            f"running what is in it; {advice}"
        )
    with path.open("rb") as stream:
        is_pickle = stream.read(1) == pickle.PROTO and not zipfile.is_zipfile(path)
    if is_pickle and "Unsupported operand" in told:
        return ModelError(
            f"{path} is a pickle that PyTorch did not write, and cannot be read as tensors alone, "
            f"without running what is in it; {advice}"
        )
    return ModelError(f"{path} is cut or damaged, or not a PyTorch file; download it again")


def _refuse_unreadable(path: Path, name: Any, tensor: Any) -> None:
    import torch

    if not isinstance(name, str):
        raise ModelError(f"{path} has {shown(name)} for a name, expected the names of tensors")
    if not isinstance(tensor, torch.Tensor):
        raise ModelError(f"{brief(name)!r} in {path} is a {type(tensor).__name__}, not a tensor")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        raise ModelError(
            f"tensor {brief(name)!r} of {path} is {tensor.device.type}, {tensor.layout}"
            f"{', quantised' if tensor.is_quantized else ''}; expected one with its values, dense"
        )
    if str(tensor.dtype).removeprefix("torch.") not in _TYPES.values():
        raise ModelError(
            f"tensor {brief(name)!r} of {path} is of type {tensor.dtype}; weights are of "
            f"{sorted(_TYPES)}"
        )


def _shards(source: Path, inside: Path | None) -> tuple[Sequence[Path], set[str]]:
    """The files of a source, and the names that its index promises (none without an index)."""
    if not source.is_dir():
        return [source], set()
    for name in WHOLE:
        index = source / f"{name}.index.json"
        if os.path.lexists(index):
            return _indexed(index, inside)
        if os.path.lexists(source / name):
            return [source / name], set()
    raise ModelError(
        f"{source} holds no weights: none of {', '.join(WHOLE)}, nor an index of shards "
        "(model.safetensors.index.json, pytorch_model.bin.index.json)"
    )


def _indexed(index: Path, inside: Path | None) -> tuple[Sequence[Path], set[str]]:
    what = "tensor names to names of files beside it, under weight_map"
    promised = read_mapping(index, inside, of=what).get("weight_map")
    if not isinstance(promised, Mapping) or not promised:
        raise ModelError(
            f"{index} has {shown(promised)} for weight_map, expected a mapping of tensor names to "
            "names of files beside it"
        )
    for tensor, name in promised.items():
        if not is_file_name(name):
            raise ModelError(
                f"{index} names the shard {shown(name)} for {shown(tensor)}, expected a file "
                "beside the index"
            )
    return [index.parent / name for name in sorted(set(promised.values()))], set(promised)
