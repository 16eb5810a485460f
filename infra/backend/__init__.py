"""Megatron-Core on whatever this machine has: call `install()` before any model code.

Nothing is imported here at module level that is slow: `install()` does it.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.backend.devices import Device, find_device
from vlfoundry.infra.backend.layout import Layout, ModelFacts
from vlfoundry.infra.core.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "Layout",
    "ModelFacts",
    "device_literals",
    "install",
    "plain_calls",
    "transformer_config",
]

MEGATRON_VERSION = "0.19.2"
# They advise callers of other versions, on every run: to compute a layout that is computed anyway,
# and to use a package for asynchronous saving that is not part of Megatron.
_TALKATIVE = (
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
)
_installed: Device | None = None


def install() -> Device:
    """Import torch and Megatron-Core and make them work on this machine. Idempotent.

    On a GPU this only imports. On a CPU it applies `infra.backend.cpu`.

    Returns:
        The decision of `infra.backend.devices`, with its reason.

    Raises:
        UserError: another version of Megatron-Core is installed; the CPU replacements name its
            private functions, so they are tied to one version.
    """
    global _installed
    if _installed is not None:
        return _installed
    from importlib.metadata import version

    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise UserError(
            f"megatron-core {found} is installed, but this code is tied to {MEGATRON_VERSION}; "
            "install that one (`make setup` does, in a checkout)"
        )
    device = find_device()
    with _quiet_import(), _compile_policy(device):
        import megatron.core.dist_checkpointing.strategies.fully_parallel
        import megatron.core.distributed
        import megatron.core.models.backends
        import megatron.core.models.mimo.model.base
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel.schedules
        import megatron.core.transformer.transformer_block  # noqa: F401
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if device.kind == "cpu":
        from vlfoundry.infra.backend import cpu

        cpu.install_rng()
        cpu.install_cuda_stand_ins()
        cpu.install_adam()
        cpu.install_results_queue()
        cpu.install_gloo()
    _installed = device
    return device


def device_literals() -> contextlib.AbstractContextManager:
    """Context in which Megatron's `device="cuda"` literals mean this machine's device.

    Needed around building an optimizer, a training step, saving and loading. Costs a little on
    every torch call, and nothing on a GPU.
    """
    if install().kind == "cuda":
        return contextlib.nullcontext()
    from vlfoundry.infra.backend.cpu import CudaLiteralsToCpu

    return CudaLiteralsToCpu()


def plain_calls() -> contextlib.AbstractContextManager:
    """Context inside `device_literals` for code that has no such literals, as models have not: it
    calls torch directly, which spares a step of a small model a tenth of its time on a CPU."""
    if install().kind == "cuda":
        return contextlib.nullcontext()
    import torch

    return torch._C.DisableTorchFunction()


def transformer_config(layout: Layout, device: Device | None = None, **fields) -> TransformerConfig:
    """Build Megatron's TransformerConfig with what the layout and the device demand.

    Args:
        layout: sizes of the parallel axes.
        device: None: this machine's.
        **fields: the model's own fields (`num_layers`, `hidden_size`, `num_attention_heads` ...);
            they win over everything set here.
    """
    device = device or install()
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
    fused = device.layer_spec == "te"
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "sequence_parallel": layout.sequence_parallel,
        "batch_p2p_comm": layout.batched_p2p,
        "overlap_p2p_comm": layout.interleaved and not layout.batched_p2p,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # Initial weights come from one CPU generator and are then cut: the same in every layout.
        "use_cpu_initialization": True,
        # The fused variants are compiled, and on a CPU the first call would start a C++ compiler.
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "persist_layer_norm": fused,
        "gradient_accumulation_fusion": False,
        "attention_softmax_in_fp32": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    with warnings.catch_warnings():
        # Its defaults for CUDA graphs, which nobody here uses, are deprecated.
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        return TransformerConfig(**(settings | fields))


@contextlib.contextmanager
def _quiet_import():
    """Drop what the imports say about packages that we do not use."""
    noisy = logging.getLogger("torch.utils.cpp_extension")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)


def _compile_policy(device: Device) -> contextlib.AbstractContextManager:
    if device.kind == "cuda":
        return contextlib.nullcontext()
    from vlfoundry.infra.backend.cpu import eager_compile

    return eager_compile()
