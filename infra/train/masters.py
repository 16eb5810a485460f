"""fp32 master weights of which the optimizer stores only what bf16 leaves out.

Transformer Engine's FusedAdam keeps a master weight as the model's own bf16 weight and a signed
16-bit remainder: as integers, master = bf16 * 2^16 + remainder. A checkpoint holds masters in
fp32, whichever way they are stored, and Megatron's buffers for it are fp32: so they are put
together on the way out, and taken apart on the way in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MASTER = "param"
"""what Megatron calls it on the way"""


def whole_masters(optimizer: Any) -> None:
    """Let a DistributedOptimizer over such a FusedAdam give and take fp32 masters."""
    import torch

    give = optimizer._get_main_param_and_optimizer_states
    take = optimizer._set_main_param_and_optimizer_states

    def held(model_param: Any) -> Any:
        """The rank's part of a weight, if its master is kept as a remainder."""
        group, place = optimizer.model_param_group_index_map[model_param]
        shard = optimizer.optimizer.param_groups[group]["params"][place]
        return shard if shard.dtype is torch.bfloat16 else None

    def get_states(model_param: Any) -> dict[str, Any]:
        states, shard = give(model_param), held(model_param)
        if shard is not None:
            states[MASTER] = join(shard.detach(), states[MASTER])
        return states

    def set_states(model_param: Any, states: dict[str, Any]) -> None:
        shard = held(model_param)
        if shard is not None:
            weight, remainder = split(states[MASTER])
            shard.data.copy_(weight)
            states = {**states, MASTER: remainder}
        take(model_param, states)

    optimizer._get_main_param_and_optimizer_states = get_states
    optimizer._set_main_param_and_optimizer_states = set_states


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """bf16 weight and int16 remainder to the fp32 master."""
    import torch

    high = weight.contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder.to(torch.int32)).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 master to bf16 weight (the nearest; of two the one away from zero) and remainder."""
    import torch

    bits = master.float().contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)
    high = (bits - remainder.to(torch.int32)) >> 16
    return high.to(torch.int16).view(torch.bfloat16), remainder
