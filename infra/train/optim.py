"""Megatron's distributed optimizer for a model, and the learning rate of every step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from vlfoundry.infra.backend.devices import find_device
from vlfoundry.infra.backend.parallel import Group
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.config import TrainConfig

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
TEXT_TOWER = "text"
"""whose embeddings the logit scale counts to (spec 5.3: all that is not of the ViT is QLLaMA's)"""


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 .. steps-1 (before `lr_scale` and `layer_decay`).

    The warm-up ends at `lr` on its last step; what follows would reach `lr * min_lr_ratio` on
    step `steps`.
    """
    warmup = config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    share = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "polynomial": (1 - progress) ** config.power,
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def set_step(optimizer: Any, step: int, config: TrainConfig) -> float:
    """Put the learning rate of `step` and the weight decay on every group; returns the rate."""
    lr = lr_at(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["max_lr"] / config.lr)
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return lr


def build_optimizer(models: Sequence[Any], config: TrainConfig) -> Any:
    """Megatron's DistributedOptimizer over the trainable parameters.

    Args:
        models: Megatron DistributedDataParallel modules: what this rank holds of the model.

    Raises:
        ConfigError: an entry of `lr_scale` or `layer_decay` matches no parameter, or this device
            has no optimizer for `moments`.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    check_moments(config)
    dtype = next(models[0].parameters()).dtype
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        **_precisions(config),
    )
    optimizer = get_megatron_optimizer(
        settings,
        list(models),
        config_overrides=_overrides(models, config),
        use_gloo_process_groups=False,
    )
    for part in parts(optimizer):
        _make_state(part, config)
        if config.optimizer == "stable_adamw":
            from vlfoundry.infra.train.stable import clip_updates

            clip_updates(part)
    return optimizer


def check_moments(config: TrainConfig) -> None:
    """Raises ConfigError where `config.moments` needs an optimizer that this device lacks."""
    device = find_device()
    if config.moments == "bf16" and device.layer_spec != "te":
        raise ConfigError(
            f"train.moments is bf16, which Transformer Engine's optimizer can on a GPU; here: "
            f"{device.reason}. Set train.moments (and train.gradients) to fp32"
        )


def _precisions(config: TrainConfig) -> dict[str, Any]:
    """Megatron's options for what `moments` and `gradients` say.

    Its `fp8_recipe` is left out on purpose, whatever the run computes in FP8: weights are bf16,
    and with it masters and gradients would be fp32 again in every step.
    """
    import torch

    if config.moments == "fp32":
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        "main_grads_dtype": torch.bfloat16 if config.gradients == "bf16" else torch.float32,
    }


def _make_state(part: Any, config: TrainConfig) -> None:
    """Make the moments now, so that a checkpoint can be written before step 1."""
    adam = part.optimizer
    if config.moments == "fp32":
        part.init_state_fn(adam)
        return
    import torch

    from vlfoundry.infra.train.masters import whole_masters

    # Megatron calls this without the second argument, which Transformer Engine 2.20 asks for.
    for group in adam.param_groups:
        for param in group["params"]:
            adam.initialize_state(param, param.dtype is torch.bfloat16)
    whole_masters(part)


def parts(optimizer: Any) -> list[Any]:
    """Megatron's distributed optimizers that own parameters on this rank."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not part.is_stub_optimizer]


def update(optimizer: Any, grad_norm: float, clip_grad: float) -> None:
    """Clip the gradients that `gradient_norm` has looked at, and step."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    if clip_grad:
        for part in parts(optimizer):
            clip_grad_by_total_norm_fp32(
                part.get_parameters(), clip_grad, grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer,
            )  # fmt: skip
    optimizer.step_with_ready_grads()


def gradient_norm(optimizer: Any) -> float:
    """Norm of all gradients over all ranks, which are handed to the optimizer for it."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def lr_factors(models: Sequence[Any], config: TrainConfig) -> dict[str, float]:
    """What `lr` is multiplied with for each parameter of this rank, by its name.

    Layer-wise decay is the rule of the official retrieval fine-tuning (spec 5.3): rate ^ (L + 1 -
    id), at most 1, where embeddings, queries and the logit scale have id 0, block i has i + 1, and
    heads L + 2.

    Raises:
        ConfigError: an entry matches no parameter on any rank.
    """
    names = [_bare(name) for model in models for name, _ in model.named_parameters()]
    _check_prefixes("lr_scale", config.lr_scale, names)
    _check_prefixes("layer_decay", config.layer_decay, names)
    depths = {stack: depth for model in models for stack, depth in _depths(model).items()}
    factors = {}
    for name in names:
        prefix = _longest_prefix(name, config.lr_scale)
        scale = config.lr_scale[prefix] if prefix is not None else 1.0
        factors[name] = scale * _layer_factor(name, config.layer_decay, depths)
    return factors


def _depths(model: Any) -> dict[str, int]:
    """Blocks of each stack in all, by what stands before `layers`; of every pipeline rank."""
    return {
        _bare(name).rpartition("layers.")[0]: module.config.num_layers
        for name, module in model.named_modules()
        if hasattr(module, "layer_number") and name.rpartition(".")[2].isdigit()
    }


def _layer_factor(name: str, rates: dict[str, float], depths: dict[str, int]) -> float:
    tower = TEXT_TOWER if name == "logit_scale" and TEXT_TOWER in rates else None
    if tower is None:
        tower = next((t for t in rates if not t or name.startswith(f"{t}.")), None)
    if tower is None:
        return 1.0
    block = LAYER.search(name)
    if block:
        layer = int(block[1]) + 1
    elif "embedding" in name or "query_tokens" in name or name == "logit_scale":
        layer = 0
    else:
        return 1.0
    depth = next(n for stack, n in depths.items() if stack.startswith(tower))
    return min(1.0, rates[tower] ** (depth + 1 - layer))


def _overrides(models: Sequence[Any], config: TrainConfig) -> dict:
    """Megatron's way to say which parameters get another rate or no decay."""
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    factors = lr_factors(models, config)

    def key(label: str, matches: Any) -> ParamKey:
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=label, fn=matches))

    overrides = {
        key("no_decay", lambda param, name: not _decays(param, _bare(name), config)): {
            "wd_mult": 0.0
        }
    }
    for factor in sorted(set(factors.values()) - {1.0}):

        def matches(param: Any, name: str, factor: float = factor) -> bool:
            return factors[_bare(name)] == factor

        overrides[key(f"lr:{factor!r}", matches)] = {"max_lr": config.lr * factor}
    return overrides


def _check_prefixes(option: str, prefixes: dict[str, float], names: list[str]) -> None:
    from megatron.core import parallel_state
    from torch import distributed as dist

    group: Group = parallel_state.get_pipeline_model_parallel_group()
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, names, group=group)
    known = {name for part in found for name in part}
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in known):
            tops = sorted({name.split(".")[0] for name in known})
            raise ConfigError(
                f"train.{option}: no parameter begins with {prefix!r}; the model has {tops}"
            )


def _decays(param: Any, name: str, config: TrainConfig) -> bool:
    if param.dim() < 2 or name.endswith(".bias"):
        return False
    return config.decay_embeddings or "embedding" not in name


def _longest_prefix(name: str, prefixes: dict[str, float]) -> str | None:
    found = [prefix for prefix in prefixes if name.startswith(prefix)]
    return max(found, key=len) if found else None


def _bare(name: str) -> str:
    """The parameter's name in the model, without the wrapper's own level."""
    return name.removeprefix("module.")
