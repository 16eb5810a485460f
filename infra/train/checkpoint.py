"""Checkpoints that a kill -9 at any moment cannot spoil.

One checkpoint is one folder, `step-00000100`: Megatron's distributed checkpoint of model, optimizer
and random states, and `train.json` with the run key, the history and a checksum of every file. It
is written under another name and renamed last, so a folder of that name is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "vlfoundry.checkpoint.v1"
MANIFEST = "train.json"
KEEP = 2


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint, before its tensors are loaded."""

    folder: Path
    """where it lies"""
    step: int
    """optimizer steps done"""
    history: list[dict[str, float]]
    """one row a step"""
    ranks: int
    """size of the world that wrote it; random states exist once a rank"""


class Checkpoints:
    """The checkpoints of one run, in one folder. Every rank makes one and calls the same methods.

    Args:
        folder: e.g. `work/contrastive/checkpoints`.
        run_key: checkpoints of another run key are ignored.
        model: the model itself, not wrapped.
        optimizer: Megatron's.
    """

    def __init__(self, folder: Path, run_key: str, model: Any, optimizer: Any) -> None:
        self._folder, self._run_key = folder, run_key
        self._model, self._optimizer = model, optimizer

    def save(self, step: int, history: list[dict[str, float]]) -> None:
        """Write the state after `step` steps, then forget all but the last two."""
        import torch.distributed as dist
        from megatron.core import dist_checkpointing

        final = self._folder / f"step-{step:08d}"
        unfinished = final.with_name(f".{final.name}.part")
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        # Returns when every rank has written.
        dist_checkpointing.save(self._state(loading=False), str(unfinished))
        if dist.get_rank() == 0:
            manifest = {
                "format": FORMAT,
                "run_key": self._run_key,
                "step": step,
                "ranks": dist.get_world_size(),
                "files": {path.name: _digest(path) for path in sorted(unfinished.iterdir())},
                "history": history,
            }
            (unfinished / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            for old in _folders(self._folder)[KEEP:]:
                shutil.rmtree(old)

    def load(self, saved: Saved) -> bool:
        """Fill model, optimizer and random states.

        Returns:
            Whether the random states were restored; another number of ranks has no use for them.
        """
        import torch
        import torch.distributed as dist
        from megatron.core import dist_checkpointing, tensor_parallel

        same_ranks = saved.ranks == dist.get_world_size()
        state = self._state(loading=True)
        if not same_ranks:
            del state["random"]
        loaded = dist_checkpointing.load(state, str(saved.folder))
        with torch.no_grad():  # Megatron fills views of the parameters in place
            self._model.load_state_dict(loaded["model"])
            self._optimizer.load_state_dict(loaded["optimizer"])
        if same_ranks:
            torch.set_rng_state(loaded["random"]["torch"])
            tensor_parallel.get_cuda_rng_tracker().set_states(loaded["random"]["megatron"])
        return same_ranks

    def _state(self, *, loading: bool) -> dict[str, Any]:
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        metadata = {
            # The only kind that can be read in another layout.
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self._model.sharded_state_dict(metadata=metadata)
        for sharded in nested_values(model):
            if isinstance(sharded, ShardedTensor):
                # Heads padded for tensor parallelism make another whole shape in every layout.
                # That it is the same model otherwise, the run key says.
                sharded.allow_shape_mismatch = True
        random = {
            "torch": torch.get_rng_state(),
            "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
        return {
            "model": model,
            "optimizer": self._optimizer.sharded_state_dict(
                model, is_loading=loading, metadata=metadata
            ),
            "random": ShardedObject("random", random, (dist.get_world_size(),), (dist.get_rank(),)),
        }


def newest(folder: Path, run_key: str, log: Callable[[str], None]) -> Saved | None:
    """The newest complete checkpoint of this run key, or None. Damaged ones are passed over."""
    for path in _folders(folder):
        manifest = _read_manifest(path)
        if manifest is None:
            log(f"checkpoint {path.name} is damaged ({MANIFEST}); trying the one before")
            continue
        if manifest["run_key"] != run_key:
            continue
        damaged = _damaged_file(path, manifest["files"])
        if damaged:
            log(f"checkpoint {path.name} is damaged ({damaged}); trying the one before")
            continue
        return Saved(
            folder=path,
            step=manifest["step"],
            history=manifest["history"],
            ranks=manifest["ranks"],
        )
    return None


def _folders(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return manifest if manifest.get("format") == FORMAT else None


def _damaged_file(path: Path, digests: dict[str, str]) -> str | None:
    for name, digest in digests.items():
        file = path / name
        if not file.is_file() or _digest(file) != digest:
            return name
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
