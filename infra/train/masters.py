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

MASTER = "master_param"
"""what FusedAdam calls it"""


def whole_masters(adam: Any) -> None:
    """Let a FusedAdam that stores remainders give and take fp32 masters."""
    import torch

    give, take = adam.get_unscaled_state, adam.set_scaled_state

    def is_remainder(param: Any, name: str) -> bool:
        return name == MASTER and param.dtype is torch.bfloat16

    def get_unscaled_state(param: Any, name: str, *args: Any, **options: Any) -> Tensor:
        state = give(param, name, *args, **options)
        return join(param.detach(), state) if is_remainder(param, name) else state

    def set_scaled_state(param: Any, name: str, state: Tensor) -> None:
        if is_remainder(param, name):
            weight, state = split(state)
            param.data.copy_(weight)
        take(param, name, state)

    adam.get_unscaled_state, adam.set_scaled_state = get_unscaled_state, set_scaled_state


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
