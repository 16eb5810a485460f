"""What a run in FP8 does beside its steps: scales that follow, what is lost, and going without.

A linear that computes in FP8 has a `fp8_product` (`models.fp8.products`). On Transformer Engine's
layers it is the engine that keeps scales, and a `fp8_watch` that says what is lost.
"""

from __future__ import annotations

from typing import Any


class Fp8Run:
    """All FP8 products that a rank holds. Every rank makes one and calls the same methods.

    Args:
        model: the model itself, not wrapped; with no such products everything here does nothing.
    """

    def __init__(self, model: Any) -> None:
        self._chunks = list(getattr(model, "chunks", [model]))
        self._products: dict[str, Any] = {
            name: product
            for chunk in self._chunks
            for name, module in chunk.named_modules()
            if (product := _product_of(module)) is not None
        }
        self._delayed = {
            name: product.delayed for name, product in self._products.items() if product.delayed
        }
        self._left = False

    def begin_step(self, *, watched: bool) -> None:
        """Forget the maxima of passes that were no step's; `watched`: count what is lost in it."""
        for scales in self._delayed.values():
            scales.forget()
        for product in self._products.values():
            product.seen = {} if watched else None

    def end_step(self) -> None:
        """Let delayed scales follow the maxima of a step that changed the weights, of all ranks
        that share these layers."""
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state

        from vlfoundry.infra.backend import install

        if self._left or not self._delayed:
            return
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        amax = torch.cat([scales.amax for scales in self._delayed.values()]).to(install().kind)
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        parts = amax.cpu().chunk(len(self._delayed))
        for scales, part in zip(self._delayed.values(), parts, strict=True):
            scales.amax.copy_(part)
            scales.update()

    def seen(self) -> dict[str, Any]:
        """Of a watched step, over all ranks: `fp8_amax`, the largest magnitude; `fp8_lost`, the
        largest share of a tensor's nonzero values that became zero; `fp8_lost_at`, which tensor's.
        """
        import torch.distributed as dist

        own = [
            (seen.amax, seen.lost / max(1, seen.nonzero), f"{name}.{role}")
            for name, product in self._products.items()
            for role, seen in (product.seen or {}).items()
        ]
        found: list[list[tuple[float, float, str]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, own)
        tensors = [tensor for rank in found for tensor in rank]
        if not tensors:
            return {}
        _, lost, where = max(tensors, key=lambda tensor: tensor[1])
        return {
            "fp8_amax": max(amax for amax, _, _ in tensors),
            "fp8_lost": lost,
            "fp8_lost_at": where,
        }

    def leave(self) -> None:
        """Let the model compute in higher precision from now on. The scales stay as they are."""
        self._left = True
        for chunk in self._chunks:
            for module in chunk.modules():
                if hasattr(module, "leave_fp8"):
                    module.leave_fp8()

    def sharded_state_dict(self) -> dict[str, Any]:
        """Delayed scales as they go into a checkpoint, under `fp8.` and the linears' names."""
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        replica = (
            0,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        return {
            f"{name}.{what}": ShardedTensor.from_rank_offsets(
                f"fp8.{name}.{what}", tensor, replica_id=replica
            )
            for name, scales in self._delayed.items()
            for what, tensor in (("scale", scales.scale), ("history", scales.history))
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state_dict` has become by loading."""
        for name, scales in self._delayed.items():
            scales.scale.copy_(state[f"{name}.scale"])
            scales.history.copy_(state[f"{name}.history"])


def _product_of(module: Any) -> Any:
    return getattr(module, "fp8_product", None) or getattr(module, "fp8_watch", None)
