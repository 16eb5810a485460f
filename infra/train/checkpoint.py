"""Checkpoints that a kill -9 at any moment cannot spoil, written beside the training.

One checkpoint is one folder, `step-00000100`: Megatron's distributed checkpoint of model, optimizer
and random states, and `train.json` with the run key, the account of the run and a checksum of every
file and of itself. It is written under another name and renamed last, so a folder of that name is
complete.

The state is copied and a forked process of each rank writes it while training goes on. What the
processes found is put together (`Checkpoints.commit`) when all of them are done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import queue
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.config import canonical_json
from vlfoundry.infra.core.errors import KilledError
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.process import die_with_parent
from vlfoundry.infra.core.space import no_space
from vlfoundry.infra.train.anomalies import TrainerState
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.ema import Ema
from vlfoundry.infra.train.fp8 import Fp8Run
from vlfoundry.infra.train.step import random_state, set_random_state

FORMAT = "vlfoundry.checkpoint.v3"
MANIFEST = "train.json"
SHARDING = "fully_reshardable"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint, before its tensors are loaded."""

    folder: Path
    """where it lies"""
    account: TrainerState
    """where the run stood"""
    ranks: int
    """size of the world that wrote it; random states exist once a rank"""


class Checkpoints:
    """The checkpoints of one run, in one folder. Every rank makes one and calls the same methods.

    Args:
        folder: e.g. `work/contrastive/0123456789ab/checkpoints`.
        run_key: checkpoints of another run key are ignored.
        model: the model itself, not wrapped.
        optimizer: Megatron's.
        ema: the running mean of the weights, if there is one.
        fp8: the scales of FP8 products.
        config: which checkpoints are kept.
    """

    def __init__(
        self,
        folder: Path,
        run_key: str,
        model: Any,
        optimizer: Any,
        ema: Ema | None,
        fp8: Fp8Run,
        config: TrainConfig,
    ) -> None:
        self._folder, self._run_key, self._config = folder, run_key, config
        self._model, self._optimizer, self._ema, self._fp8 = model, optimizer, ema, fp8
        self._pending: _Pending | None = None

    def save(self, account: TrainerState) -> None:
        """Begin to write the state; the one before is committed first."""
        import torch.distributed as dist
        from megatron.core import dist_checkpointing

        self.finish()
        final = self._folder / f"step-{account.step:08d}"
        unfinished = final.with_name(f".{final.name}.part")
        if dist.get_rank() == 0:
            for old in self._folder.glob(".step-*.part"):
                shutil.rmtree(old)
            unfinished.mkdir(parents=True)
        dist.barrier()
        request = dist_checkpointing.save(
            self._state(loading=False), str(unfinished),
            async_sharded_save=True, async_strategy="mcore",
        )  # fmt: skip
        # The manifest is made of what is known now: the account moves on.
        self._pending = _Pending(
            final=final,
            unfinished=unfinished,
            manifest=self._manifest(account),
            request=request,
            writer=_Writer(request),
        )

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing; when no rank is, every rank must `commit`."""
        return self._pending is not None and not self._pending.writer.done

    @property
    def waits_for_commit(self) -> bool:
        """Whether a save was begun that is not committed; the same on all ranks."""
        return self._pending is not None

    def finish(self) -> None:
        """Wait until what was begun is written, and commit it."""
        if self._pending is not None:
            self._pending.writer.wait()
            self.commit()

    def commit(self) -> None:
        """Make the checkpoint that all ranks have written a complete one, and forget old ones."""
        import torch.distributed as dist
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        pending, self._pending = self._pending, None
        assert pending is not None, "nothing was begun"
        written = pending.writer.result()
        heard: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(heard, (written.digests, written.failure))
        failures = [failure for _, failure in heard if failure]
        if failures:
            if dist.get_rank() == 0:
                shutil.rmtree(pending.unfinished)
            raise failures[0]
        if written.results is not None:
            filesystem_async.get_write_results_queue().put(written.results)
        for finalize in pending.request.finalize_fns:
            finalize()
        if dist.get_rank() != 0:
            return
        files = {name: digest for digests, _ in heard for name, digest in digests.items()}
        for path in pending.unfinished.iterdir():  # what is written last is small
            if path.name not in files:
                files[path.name] = fingerprint(path)
        manifest = {**pending.manifest, "files": dict(sorted(files.items()))}
        _write_manifest(pending.unfinished / MANIFEST, manifest)
        shutil.rmtree(pending.final, ignore_errors=True)
        pending.unfinished.rename(pending.final)
        self._forget_old()

    def load(self, saved: Saved) -> bool:
        """Fill model, optimizer, running mean, FP8 scales and random states.

        Returns:
            Whether the random states were restored; another number of ranks has no use for them.
        """
        import torch
        import torch.distributed as dist
        from megatron.core import dist_checkpointing

        same_ranks = saved.ranks == dist.get_world_size()
        state = self._state(loading=True)
        if not same_ranks:
            del state["random"]
        with warnings.catch_warnings():
            # Megatron reads the common part on each rank alone, and calls torch in its older way.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            warnings.filterwarnings("ignore", message="The argument order of load has been changed")
            loaded: Any = dist_checkpointing.load(state, str(saved.folder))
        with torch.no_grad():  # Megatron fills views of the parameters in place
            self._model.load_state_dict(loaded["model"])
            self._load_optimizer(loaded)
            if self._ema:
                self._ema.load_state_dict(loaded["ema"])
            self._fp8.load_state_dict(loaded["fp8"])
        if same_ranks:
            set_random_state(loaded["random"])
        return same_ranks

    def _state(self, *, loading: bool) -> dict[str, Any]:
        import torch.distributed as dist
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        metadata = {
            # The only kind that can be read in another layout.
            "distrib_optim_sharding_type": SHARDING,
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
        optimizer = self._optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {
            "model": model,
            "optimizer": [part["param_state"] for part in self._parts(optimizer)],
            "optimizer_steps": self._optimizer.param_groups[0].get("step", 0),
            "fp8": self._fp8.sharded_state_dict(),
            "random": ShardedObject(
                "random", random_state(), (dist.get_world_size(),), (dist.get_rank(),)
            ),
        } | ({"ema": self._ema.sharded_state_dict(model)} if self._ema else {})

    def _parts(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Of an optimizer's state. How many there are depends on the layout, and so does which
        parameters are in which; so a checkpoint holds nothing but tensors by name, and the number
        of steps. What else a part has to say, the config says again."""
        chained = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        return [state] if len(chained) == 1 else list(state.values())

    def _load_optimizer(self, loaded: dict[str, Any]) -> None:
        state = self._optimizer.state_dict()
        parts = state if isinstance(state, list) else [state]
        for part, tensors in zip(parts, loaded["optimizer"], strict=True):
            for group in part["optimizer"]["param_groups"]:
                group["step"] = loaded["optimizer_steps"]
            part |= {"param_state": tensors, "param_state_sharding_type": SHARDING}
        self._optimizer.load_state_dict(dict(enumerate(parts)) if len(parts) > 1 else parts[0])

    def _manifest(self, account: TrainerState) -> dict[str, Any]:
        import torch.distributed as dist

        config = self._config
        value = None
        if config.keep_best:
            value = account.mean_since(
                account.step - config.save_every_steps, config.keep_best.removeprefix("-")
            )
        manifest = {
            "format": FORMAT,
            "run_key": self._run_key,
            "ranks": dist.get_world_size(),
            "account": dataclasses.asdict(account),
            "value": value,
        }
        return json.loads(json.dumps(manifest))

    def _forget_old(self) -> None:
        """Keep the newest, the best, and the newest to which a run can roll back."""
        folders = _folders(self._folder)
        kept = set(folders[: self._config.keep_checkpoints])
        regular = [p for p in folders if _step(p) % self._config.save_every_steps == 0]
        kept |= set(regular[:1])
        best = (
            best_checkpoint(self._folder, self._run_key, self._config)
            if (self._config.keep_best)
            else None
        )
        for folder in folders:
            if folder not in kept and folder != best:
                shutil.rmtree(folder)


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A checkpoint that is being written."""

    final: Path
    unfinished: Path
    manifest: dict[str, Any]
    request: Any
    writer: _Writer


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What one rank's writer says in the end."""

    results: Any = None
    """what Megatron puts into the checkpoint's metadata; None: this rank had nothing to write"""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """checksum of each file that it wrote"""
    failure: Exception | None = None
    """why there is no checkpoint; every rank raises it"""


class _Writer:
    """A forked process that writes this rank's part; its copy of our memory is the snapshot.

    Megatron's own caller sends the results through a pipe that the reader empties after the end of
    the writer: with many tensors both wait for ever. Here they go through a file.
    """

    def __init__(self, request: Any) -> None:
        self._code: int | None = None
        self._pid = 0
        if request.async_fn is None:
            self._code = 0
            return
        function, arguments = request.async_fn, list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # from the GPU
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `result`
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _be_writer(parent, function, arguments, self._answer)

    @property
    def done(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def wait(self) -> None:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def result(self) -> _Written:
        """What it wrote, or why it did not."""
        assert self._code is not None, "it still writes"
        if not self._pid:
            return _Written()
        with self._answer as stream:
            stream.seek(0)
            with contextlib.suppress(EOFError, pickle.UnpicklingError):
                return pickle.load(stream)
        if self._code > 0:
            return _Written(failure=RuntimeError(f"the writer ended with exit code {self._code}"))
        return _Written(failure=KilledError.of("the process that writes a checkpoint", self._code))


def _be_writer(parent: int, function: Callable, arguments: list[Any], answer: Any) -> None:
    """The whole life of a writer. Never returns."""
    code = 1
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before we could ask
            os._exit(code)
        pickle.dump(_write(function, *arguments), answer)
        answer.flush()
        code = 0
    finally:
        os._exit(code)


def _write(function: Callable, rank: Any, buckets: Any, _: Any) -> _Written:
    """Write this rank's part; what Megatron swallows, the cause, is found out at once."""
    results: queue.Queue = queue.Queue()
    folders = {Path(path).parent for path, _, _ in buckets}
    try:
        function(rank, buckets, results)
        result = results.get_nowait()
        if isinstance(result, Exception):
            raise result
        digests = {Path(path).name: fingerprint(path) for path, _, _ in buckets}
    except Exception as error:  # noqa: BLE001 - the ranks raise it
        full = no_space(error, *folders, ask_disks=True)
        if full is None:
            text = f"the writer ended with exit code 1:\n{traceback.format_exc()}"
            return _Written(failure=RuntimeError(text))
        return _Written(failure=full)
    return _Written(results=result, digests=digests)


def newest(
    folder: Path, run_key: str, log: Callable[[str], None], at: int | None = None
) -> Saved | None:
    """The newest complete checkpoint of this run key, or None. Damaged ones are passed over.

    Args:
        folder: of the checkpoints.
        run_key: of this run.
        log: told of each damaged one.
        at: look at those of at most so many steps; None: at all.
    """
    for path in _folders(folder):
        if at is not None and _step(path) > at:
            continue
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
            folder=path, account=TrainerState(**manifest["account"]), ranks=manifest["ranks"]
        )
    return None


def best_checkpoint(folder: Path, run_key: str, config: TrainConfig) -> Path | None:
    """The checkpoint with the best `train.keep_best`; of equal ones the older."""
    sign = -1 if config.keep_best.startswith("-") else 1
    values = {}
    for path in reversed(_folders(folder)):
        manifest = _read_manifest(path)
        if manifest and manifest["run_key"] == run_key and manifest["value"] is not None:
            values[path] = sign * manifest["value"]
    return min(values, key=lambda path: values[path]) if values else None


def _folders(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    body = canonical_json(manifest)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    with path.open("w", encoding="utf-8") as stream:
        stream.write(canonical_json({**manifest, "checksum": checksum}))
        stream.flush()
        os.fsync(stream.fileno())


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """None where it is not what was written, to the last bit."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None
    body = canonical_json(manifest)
    if hashlib.sha256(body.encode()).hexdigest() != checksum or manifest["format"] != FORMAT:
        return None
    return manifest


def _damaged_file(path: Path, digests: dict[str, str]) -> str | None:
    for name, digest in digests.items():
        file = path / name
        if not file.is_file() or fingerprint(file) != digest:
            return name
    return None
