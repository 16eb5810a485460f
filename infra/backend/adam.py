"""AdamW on the CPU under the contract that Megatron's distributed optimizer relies on."""

from __future__ import annotations

from typing import Any

import torch


class CpuFusedAdam(torch.optim.Optimizer):
    """AdamW whose `step` lives in the parameter group, as in Transformer Engine's FusedAdam.

    Megatron's DistributedOptimizer saves and restores `exp_avg` and `exp_avg_sq` a parameter and
    `step` a group. torch.optim.AdamW keeps `step` as a tensor beside the moments: the distributed
    optimizer then restores it wrongly, without an error. The arithmetic here is that of
    torch.optim.AdamW, bit for bit, and a checkpoint has the same fields as one made on a GPU.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **unused,
    ):
        """Take torch.optim.AdamW's arguments; `unused` are FusedAdam's switches for GPUs."""
        if not unused.pop("adam_w_mode", True) or not unused.pop("bias_correction", True):
            raise ValueError("CpuFusedAdam has decoupled weight decay and bias correction only")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": True})

    @torch.no_grad()
    # pyrefly: ignore[bad-override]  # no closure is ever given: nothing is returned
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            if params:
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict) -> None:
        lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        step = group["step"]
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        grads = [p.grad for p in params if p.grad is not None]
        means = [self._moment(p, "exp_avg") for p in params]
        squares = [self._moment(p, "exp_avg_sq") for p in params]
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, bias2**0.5)
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(params, means, denominators, -(lr / bias1))

    def _moment(self, param: torch.Tensor, name: str) -> torch.Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param, dtype=torch.float32)
        return state[name]
