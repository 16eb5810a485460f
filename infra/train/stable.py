"""StableAdamW: AdamW whose step is shortened where the second moment lags behind the gradients.

Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
algorithm 2: each tensor's learning rate is divided by max(1, RMS) with
RMS^2 = mean(g^2 / max(u, eps^2)), u the second moment with this step's gradient in it, bias
corrected. The whole step, decay included, is proportional to the rate. So any AdamW does the step,
and what it changed is shortened afterwards: the same on a CPU and with Transformer Engine's fused
kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def clip_updates(optimizer: Any) -> None:
    """Make a StableAdamW of one of Megatron's distributed optimizers.

    The optimizer's shards cut tensors anywhere, so the mean is taken over the data-parallel ranks
    and, where a tensor is cut for tensor parallelism, over the tensor-parallel ranks too. Padding
    counts neither as gradient (it has none) nor as elements.
    """
    shards = _Shards(optimizer)
    before: list[tuple[Tensor, Tensor, float]] = []

    def remember(*_: Any) -> None:
        for shard, rms in shards.rms():
            if rms > 1:
                before.append((shard, shard.detach().clone(), 1 / rms))

    def shorten(*_: Any) -> None:
        for shard, old, share in before:
            shard.data.copy_(old.lerp_(shard.detach(), share))
        before.clear()

    optimizer.optimizer.register_step_pre_hook(remember)
    optimizer.optimizer.register_step_post_hook(shorten)


class _Shards:
    """This rank's pieces of the main parameters, and what they are pieces of."""

    def __init__(self, optimizer: Any) -> None:
        from megatron.core import parallel_state

        self._inner = optimizer.optimizer
        self._data = optimizer.data_parallel_group
        params = [param for buffer in optimizer.buffers for param in buffer.params]
        group: Any = parallel_state.get_tensor_model_parallel_group()
        if not getattr(params[0], "allreduce", True):  # the text tower stands apart
            group = parallel_state.get_expert_tensor_parallel_group()
        self._tensor = group
        self._cut = [bool(getattr(param, "tensor_model_parallel", False)) for param in params]
        self._counts = [
            _elements(param, self._tensor.size() if cut else 1)
            for param, cut in zip(params, self._cut, strict=True)
        ]
        # (which tensor, its group and place in the optimizer); loading makes other groups.
        self._mine = [
            (index, *optimizer.model_param_group_index_map[param])
            for index, param in enumerate(params)
            if param in optimizer.model_param_group_index_map
        ]

    def rms(self) -> list[tuple[Tensor, float]]:
        """Each shard with the RMS of its whole tensor, for the step that is about to be made."""
        import torch
        import torch.distributed as dist

        sums = torch.zeros(len(self._counts), device=torch.cuda.current_device())
        shards = []
        for index, group_index, order in self._mine:
            group = self._inner.param_groups[group_index]
            shards.append((index, group["params"][order]))
            sums[index] = self._ratio(shards[-1][1], group).sum()
        dist.all_reduce(sums, group=self._data)
        if self._tensor.size() > 1:
            whole = sums.clone()
            dist.all_reduce(whole, group=self._tensor)
            sums = torch.where(torch.tensor(self._cut, device=sums.device), whole, sums)
        values = sums.tolist()
        return [(shard, math.sqrt(values[i] / self._counts[i])) for i, shard in shards]

    def _ratio(self, shard: Any, group: dict) -> Tensor:
        """g^2 / max(u, eps^2) with the second moment u as the coming step will see it."""
        beta2, step = group["betas"][1], int(group.get("step", 0)) + 1
        squared = shard.grad.float().square()
        moment = self._inner.state[shard]["exp_avg_sq"]
        corrected = moment.lerp(squared, 1 - beta2).div_(1 - beta2**step)
        return squared / corrected.clamp_(min=group["eps"] ** 2)


def _elements(param: Any, tensor_ranks: int) -> int:
    """Elements of the whole tensor, without the padding that a layout adds."""
    true_shape = getattr(param, "true_shape", None)
    return math.prod(true_shape) if true_shape is not None else param.numel() * tensor_ranks
