"""AdamW in a few lines, for a model that trains for seconds.

Making any `torch.optim.Optimizer` imports torch's compiler: 4 CPU-seconds in each fold.
"""

import torch


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); none on vectors."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = parameters
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self._steps = 0
        self._means = [torch.zeros_like(p) for p in parameters]
        self._squares = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lrs: list[float]) -> None:
        """Update each parameter with its own learning rate and forget the gradients."""
        self._steps += 1
        beta1, beta2 = self.betas
        bias1, bias2 = 1 - beta1**self._steps, 1 - beta2**self._steps
        state = zip(self.parameters, self._means, self._squares, lrs, strict=True)
        for p, mean, square, lr in state:
            assert p.grad is not None, "a parameter of the scorer took no part in the loss"
            mean.lerp_(p.grad, 1 - beta1)
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            if p.ndim > 1:
                p.mul_(1 - lr * self.weight_decay)
            denominator = square.sqrt().div_(bias2**0.5).add_(self.eps)
            p.addcdiv_(mean, denominator, value=-lr / bias1)
            p.grad = None
