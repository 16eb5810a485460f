"""What is computed more finely than the weights are kept."""

import torch
from torch import Tensor


def wide(numbers: Tensor) -> Tensor:
    """At least fp32, which norms and losses are computed in: bf16 knows a logit of 100 to 0.5."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))
