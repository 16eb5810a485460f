"""What Megatron-Core 0.19.2 needs on a machine without a GPU.

Megatron has no CPU path: it asks `torch.cuda` for the current device and stream, writes
`device="cuda"` in schedules and optimizers, keeps its random states on the GPU, and starts a
manager process to save a checkpoint. Each replacement below is the smallest that answers those
calls truthfully for a CPU. Nothing here runs where a GPU is visible.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed import Backend, ProcessGroupGloo, Store
from torch.overrides import TorchFunctionMode

GLOO = "gloo_one_device"
"""gloo as `install_gloo` registers it"""

_CPU = torch.device("cpu")

# Megatron's optimizers sort parameters by this name and refuse the names of CPU types.
_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


@contextlib.contextmanager
def eager_compile() -> Iterator[None]:
    """Make `torch.compile` return its argument while Megatron is imported.

    Its decorators at module level would import inductor (half of the import time), and the first
    call of a fused function would start a C++ compiler.
    """
    compile_function = torch.compile

    def leave_eager(model: Callable | None = None, **_options) -> Callable:
        return (lambda function: function) if model is None else model

    torch.compile = leave_eager
    try:
        yield
    finally:
        torch.compile = compile_function


class _NullStream:
    """Stands in for a CUDA stream: CPU work is already in order."""

    device = _CPU
    cuda_stream = 0

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None):
        return event


class CudaLiteralsToCpu(TorchFunctionMode):
    """While active, `device="cuda"` means the CPU, `.cuda()` is the identity and `.type()` answers
    with the name that Megatron's optimizers look for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs = {**kwargs, "device": _CPU}
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1:
            name = func(*args)
            return _CUDA_TYPE_NAMES.get(name, name)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def install_rng() -> None:
    """Keep Megatron's named random states in CPU generators.

    `initialize_rng_tracker` returns early when it finds a tracker; activation recompute goes
    through the two module functions, which on a CPU silently do nothing.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
        """The random states of one rank: `add` names one, `fork` draws from it."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or its seed {seed} exists already")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            outer_name, outer = self._current_state_name, torch.get_rng_state()
            if outer_name != "default-rng":
                self.states_[outer_name] = outer
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)
                self._current_state_name = outer_name

    def get_state(
        device: Any = "cpu", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    _replace(
        megatron_random,
        _CUDA_RNG_STATE_TRACKER=CpuRngTracker(),
        _CUDA_RNG_STATE_TRACKER_INITIALIZED=True,
        _get_cuda_rng_state=get_state,
        _set_cuda_rng_state=set_state,
    )


def _replace(module: Any, **others: Any) -> None:
    """Put others in the place of a module's variables and functions."""
    for name, value in others.items():
        setattr(module, name, value)


def install_cuda_stand_ins() -> None:
    """Answer the three questions that Megatron asks `torch.cuda` everywhere."""
    stream = _NullStream()
    _replace(
        torch.cuda,
        current_device=lambda: _CPU,
        current_stream=lambda device=None: stream,
        synchronize=lambda device=None: None,
    )


def install_adam() -> None:
    """Give the optimizers an Adam with the contract that they were written for."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from vlfoundry.infra.backend.adam import CpuFusedAdam

    _replace(optimizer, Adam=CpuFusedAdam, USING_PYTORCH_OPTIMIZER=False)
    _replace(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


def install_results_queue() -> None:
    """Let a synchronous save collect its results in a plain queue.

    Otherwise the first save spawns a manager process, which imports `__main__` and Megatron again.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    _replace(filesystem_async, _results_queue=queue.Queue())


def install_gloo() -> None:
    """Register `GLOO`: gloo whose process groups share one device and compute in one thread.

    Megatron makes some twenty groups on each rank. Plain gloo gives each a device, whose thread
    wakes a hundred times a second, and two threads for collectives that run one after the other.

    It could also connect them when they are first used (`lazy_init`), which is faster still; with
    torch 2.11 now and then two ranks wait for each other for ever then.
    """
    Backend.register_backend(GLOO, _gloo_group, devices=["cpu"])


def _gloo_group(
    store: Store, rank: int, size: int, timeout: datetime.timedelta
) -> ProcessGroupGloo:
    group: Any = ProcessGroupGloo  # whose stub has no options
    options = group._Options()
    options._devices = [_gloo_device()]
    options._threads = 1
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


@functools.cache
def _gloo_device() -> ProcessGroupGloo.Device:
    return ProcessGroupGloo.create_default_device()
