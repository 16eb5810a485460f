"""The one place that asks whether there is a GPU, and what follows from the answer."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Device:
    """What this machine computes on, and why. Stored in every run record."""

    kind: Literal["cpu", "cuda"]
    """where tensors live"""
    reason: str
    """one sentence for the user and the run record"""
    process_group: Literal["gloo", "nccl"]
    """the collective library between ranks"""
    layer_spec: Literal["local", "te"]
    """Megatron's own modules, or Transformer Engine's"""
    precision: Literal["fp32", "bf16"]
    """of parameters and activations"""


@functools.cache
def find_device() -> Device:
    """Decide once a process.

    The question goes to NVML, not to the CUDA runtime: a process that has initialised CUDA
    cannot fork ranks that use it.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if not torch.cuda.is_available():
        return Device(
            kind="cpu",
            reason="no GPU is visible to PyTorch; fp32, because bf16 is slower on most CPUs",
            process_group="gloo",
            layer_spec="local",
            precision="fp32",
        )
    has_te = importlib.util.find_spec("transformer_engine") is not None
    return Device(
        kind="cuda",
        reason="a GPU is visible; Transformer Engine is "
        + ("installed" if has_te else "not installed, so Megatron's local modules are used"),
        process_group="nccl",
        layer_spec="te" if has_te else "local",
        precision="bf16",
    )
