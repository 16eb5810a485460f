"""A running mean of the weights, which lies in checkpoints and may be the model in the end."""

from __future__ import annotations

from typing import Any


class Ema:
    """fp32 copies of this rank's trained parameters, cut as these are.

    Every step moves them by 1 - decay towards the parameters; they begin as the initial weights.

    Args:
        model: the model itself, not wrapped.
        decay: of one step.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self._decay = decay
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._model = model
        self._means = {n: p.detach().float().clone() for n, p in self._params.items()}

    def update(self) -> None:
        """Follow the parameters after a step."""
        import torch

        targets = [param.detach().float() for param in self._params.values()]
        torch._foreach_lerp_(list(self._means.values()), targets, 1 - self._decay)

    def move_into_model(self) -> None:
        """Make the means the weights of the model."""
        for name, param in self._params.items():
            param.data.copy_(self._means[name])

    def sharded_state_dict(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """The means as they go into a checkpoint, under `ema.` and the parameters' keys.

        Args:
            model_state: the model's own.
        """
        from dataclasses import replace

        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

        names = {id(param): name for name, param in self._params.items()}
        state = {}
        for sharded in model_state.values():
            name = names.get(id(getattr(sharded, "data", None)))
            if name is None:
                continue
            changes = {"key": f"ema.{sharded.key}", "data": self._means[name]}
            if not isinstance(sharded, ShardedTensorFactory):
                changes["dtype"] = self._means[name].dtype
            state[name] = replace(sharded, **changes)
        assert set(state) == set(self._params), "a trained parameter is not in the model's state"
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state_dict` has become by loading."""
        for name, mean in self._means.items():
            mean.copy_(state[name])
