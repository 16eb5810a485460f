"""Megatron's distributed optimizer for a model, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from infra.errors import ConfigError
from infra.train.config import TrainConfig


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 .. steps-1 (before `lr_scale`).

    The warm-up ends at `lr` on step `warmup_steps - 1`; the cosine would reach
    `lr * min_lr_ratio` on step `steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


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
        ConfigError: an entry of `lr_scale` matches no parameter.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

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
    )
    return get_megatron_optimizer(
        settings,
        list(models),
        config_overrides=_overrides(models, config),
        use_gloo_process_groups=False,
    )


def _overrides(models: Sequence[Any], config: TrainConfig) -> dict:
    """Megatron's way to say which parameters get another rate or no decay."""
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    names = _names_of_all_stages(models)
    for prefix in config.lr_scale:
        if not any(name.startswith(prefix) for name in names):
            tops = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"train.lr_scale: no parameter begins with {prefix!r}; the model has {tops}"
            )

    def key(label: str, matches) -> ParamKey:
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=label, fn=matches))

    overrides = {
        key("no_decay", lambda param, name: not _decays(param, _bare(name), config)): {
            "wd_mult": 0.0
        }
    }
    for prefix, factor in config.lr_scale.items():

        def matches(param, name: str, prefix: str = prefix) -> bool:
            return _longest_prefix(_bare(name), config.lr_scale) == prefix

        overrides[key(f"lr:{prefix}", matches)] = {"max_lr": config.lr * factor}
    return overrides


def _names_of_all_stages(models: Sequence[Any]) -> list[str]:
    """A stage of a pipeline holds part of the model; what a rate is for may be in another's."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    every: list[list[str]] = [[]] * group.size()
    names = [_bare(name) for model in models for name, _ in model.named_parameters()]
    dist.all_gather_object(every, names, group=group)
    return [name for stage in every for name in stage]


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
