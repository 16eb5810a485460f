"""A stack of transformer layers, or the consecutive ones of it that a pipeline stage holds.

Letters: S tokens, B batch, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlfoundry.infra.backend.fp8_config import MULTIPLE
from vlfoundry.infra.backend.parallel import current_fp8
from vlfoundry.models.layers.linear import use_fp8
from vlfoundry.models.layers.megatron import (
    ModuleSpec,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerConfig,
    build_module,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from vlfoundry.models.layers.packing import is_packed
from vlfoundry.models.layers.parallel import pad_to_multiple, process_groups


class Layers(nn.ModuleList):
    """Layers called by their place in the whole stack: a stage from layer 3 on has "3", "4", ...

    So parameters have the same names in every layout. Indexing counts what is here.
    """

    def __init__(self, layers: Mapping[int, nn.Module]):
        super().__init__()
        for index, layer in layers.items():
            self.add_module(str(index), layer)

    def __getitem__(self, index: Any):  # pyrefly: ignore[bad-override]
        return list(self._modules.values())[index]


class Stack(TransformerBlock):
    """Megatron's block with our way of cutting it.

    The tokens go in as [S, B, D] and come out so. Under sequence parallelism they are padded to a
    multiple of the tensor ranks and cut on the way in, and put together again on the way out; what
    travels between two stages stays cut. `tokens_seen` counts those that came in to be learnt from.

    Layers compute in FP8 as `infra.backend.parallel` says when they are built: which of them, goes
    by their place in the whole stack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_specs: Sequence[ModuleSpec],
        layers: range,
        *,
        layer_norm: Callable | None = None,
    ):
        self.held = layers
        self.depth = len(layer_specs)
        self.tokens_seen = 0
        submodules = TransformerBlockSubmodules(
            layer_specs=[layer_specs[index] for index in layers], layer_norm=layer_norm
        )
        super().__init__(
            config,
            submodules,
            post_layer_norm=layer_norm is not None,
            post_process=self.ends,
            pg_collection=process_groups(),
        )

    @property
    def starts(self) -> bool:
        """Whether the first layer of the whole stack is here."""
        return self.held.start == 0

    @property
    def ends(self) -> bool:
        """Whether the last layer of the whole stack is here, and with it the final norm."""
        return self.held.stop == self.depth

    def _build_layers(self) -> None:
        self.layers = Layers(
            {
                index: self._build_layer(spec, index)
                for index, spec in zip(self.held, self.submodules.layer_specs or (), strict=True)
            }
        )
        fp8 = current_fp8()
        for index, layer in zip(self.held, self.layers, strict=True):
            if fp8 and fp8.covers(index, self.depth):
                use_fp8(layer, fp8)
        self.final_layernorm: Any = None
        if self.has_final_layernorm_in_this_stage():
            norm: Any = self.submodules.layer_norm
            self.final_layernorm = norm(
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )

    def _build_layer(self, spec: ModuleSpec, index: int) -> Any:
        return build_module(
            spec,
            config=self.config,
            layer_number=index + 1,
            pg_collection=self.pg_collection,
        )

    def padding(self, length: int, batch: int) -> int:
        """Tokens that are put behind S `length` ones of each of B `batch` rows.

        Under sequence parallelism each rank gets as many, and in FP8 as many as it can multiply.
        """
        if not self.config.sequence_parallel:
            return 0
        step = self.tp_group.size()
        if self.config.fp8:
            recipe: Any = self.config.fp8_recipe  # Megatron has more of them
            multiple = MULTIPLE[recipe]
            step *= multiple // math.gcd(multiple, batch)
        return pad_to_multiple(length, step) - length

    def leave_fp8(self) -> None:
        """Compute in higher precision from now on."""
        self.config.fp8 = None  # Megatron's block asks it before each layer
        use_fp8(self, None)

    def through(
        self,
        tokens: Tensor,
        length: int,
        *,
        wanted: Collection[int] = (),
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers that are here.

        Args:
            tokens: [S, B, D] where the stack starts, else what the stage before returned.
            length: S.
            wanted: states to return beside the result; state 0 is what goes into the first layer,
                state i what layer i-1 returned.
            mask: as `models.layers.attention` takes it; its two last axes are S or 1 long.
            rotary: angles [S, B or 1, 1, head size].
            context: handed to every layer.

        Returns:
            The result (whole and normed where the stack ends), and the wanted states that are
            made here, each whole [S, B, D].
        """
        more = self.padding(length, tokens.shape[1])
        mask, rotary = _widen_mask(mask, length, more), _widen(rotary, more)
        found: dict[int, Tensor] = {}
        if self.starts:
            if torch.is_grad_enabled():
                self.tokens_seen += length * tokens.shape[1]
            if 0 in wanted:
                found[0] = tokens
            tokens = self._cut(tokens, more)
        inner = sorted(i - 1 for i in wanted if i - 1 in self.held and i < self.depth)
        result = self(
            tokens,
            attention_mask=mask,
            rotary_pos_emb=rotary,
            context=context,
            extract_layer_indices={index - self.held.start for index in inner},
        )
        if inner:
            result, states = result
            found |= {i + 1: self._whole(s, length) for i, s in zip(inner, states, strict=True)}
        if self.ends:
            result = self._whole(result, length)
            if self.depth in wanted:
                found[self.depth] = result
        for state in (result, *found.values()):
            if state.requires_grad:
                # Sums over tokens follow the strides of what comes back; these are the same in
                # every layout, so no bit of a gradient depends on it.
                state.register_hook(Tensor.contiguous)
        return result, found

    def _cut(self, tokens: Tensor, more: int) -> Tensor:
        if not self.config.sequence_parallel:
            return tokens
        return scatter_to_sequence_parallel_region(_widen(tokens, more), group=self.tp_group)

    def _whole(self, tokens: Tensor, length: int) -> Tensor:
        if not self.config.sequence_parallel:
            return tokens
        # Every tensor rank goes on with all tokens, so each has the whole gradient.
        return gather_from_sequence_parallel_region(
            tokens, tensor_parallel_output_grad=False, group=self.tp_group
        )[:length]


def _widen(tokens: Tensor | None, more: int) -> Tensor | None:
    """Zeros behind the first axis."""
    if tokens is None or not more:
        return tokens
    return torch.cat([tokens, tokens.new_zeros(more, *tokens.shape[1:])])


def _widen_mask(mask: Tensor | None, length: int, more: int) -> Tensor | None:
    """Nobody looks at padding; causal attention (None) does not anyway, if it is at the end.

    A number of keys that count (see `models.layers.attention`) says it already. To packed samples
    padding is one sample more.
    """
    if mask is None or not more or mask.dim() == 0:
        return mask
    if is_packed(mask):
        return torch.cat([mask, mask.new_tensor([length + more])])
    block = True if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    rows = more if mask.shape[-2] == length else 0
    # Rows of padding look at what the last real token looks at: none may look at nothing.
    last = mask[..., -1:, :].expand(*mask.shape[:-2], rows, mask.shape[-1])
    return pad(torch.cat([mask, last], -2), (0, more), value=block)
