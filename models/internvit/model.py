"""InternViT (InternVL, section 3.2 and table 1).

Letters: B batch, T tokens, K kept patches, P patch side, D width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.layers.canonical import set_init, set_rule, set_true_shape
from vlfoundry.models.layers.config import LayerSpecKind
from vlfoundry.models.layers.draws import uniforms
from vlfoundry.models.layers.layer import ScaledLayer, layer_submodules
from vlfoundry.models.layers.lora import add_lora
from vlfoundry.models.layers.megatron import ModuleSpec
from vlfoundry.models.layers.parallel import Part, pad_to_multiple, stack_config, tensor_group
from vlfoundry.models.layers.specs import Parts, parts_of
from vlfoundry.models.layers.stack import Stack


class InternViT(Part):
    """Image to tokens. No norm after the last layer: the output is the residual stream.

    A pipeline stage may hold only some `layers`: the embeddings are where the first one is.
    """

    def __init__(
        self,
        config: InternViTConfig,
        spec: LayerSpecKind = "local",
        layers: range | None = None,
    ):
        stack = _stack_config(config, spec)
        super().__init__(stack)
        self.vit_config = config
        self.decoder = Stack(
            stack,
            [_layer_spec(config, parts_of(spec))] * config.depth,
            range(config.depth) if layers is None else layers,
        )
        if self.starts:
            make = {"dtype": stack.params_dtype}
            self.patch_embedding = nn.Linear(3 * config.patch_px**2, config.width, **make)
            self.class_embedding = nn.Parameter(torch.zeros(config.width, **make))
            self.position_embedding = nn.Parameter(
                torch.zeros(1 + config.patches, config.width, **make)
            )
        self._set_init_rules()
        add_lora(self.decoder.layers, config.lora, separate=False)

    @property
    def starts(self) -> bool:
        """Whether the first layer is here, and with it the embeddings."""
        return self.decoder.starts

    @property
    def ends(self) -> bool:
        """Whether the last layer is here."""
        return self.decoder.ends

    def forward(self, pixels: Tensor, kept: Tensor | None = None, hidden_state: int = -1) -> Tensor:
        """Encode images; with all layers here.

        Args:
            pixels: normalised [B, 3, height, width]; sides are multiples of `patch_px`.
            kept: patch indices [B, K] to encode (FLIP masking), or None for all patches.
            hidden_state: which entry of (embeddings, after layer 1, ..., after the last) to
                return; negative counts from the end.

        Returns:
            [B, 1 + patches, D], or [B, 1 + K, D]; the class token is first.
        """
        index = self.state_index(hidden_state)
        result, found = self.through(None, pixels, kept, wanted=(index,))
        return (result if index == self.vit_config.depth else found[index]).transpose(0, 1)

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """All `depth + 1` states, each [B, T, D], from one pass."""
        wanted = range(self.vit_config.depth + 1)
        _, found = self.through(None, pixels, wanted=wanted)
        return [found[index].transpose(0, 1) for index in wanted]

    def state_index(self, hidden_state: int) -> int:
        """Which of the `depth + 1` states is meant; negative counts from the end."""
        depth = self.vit_config.depth
        index = hidden_state if hidden_state >= 0 else depth + 1 + hidden_state
        if not 0 <= index <= depth:
            raise ModelError(
                f"hidden_state {hidden_state} is outside the {depth + 1} states of {depth} layers"
            )
        return index

    def through(
        self,
        tokens: Tensor | None,
        pixels: Tensor,
        kept: Tensor | None = None,
        *,
        wanted: Collection[int] = (),
        samples: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers that are here.

        Args:
            tokens: what the stage before returned; None where the tower starts.
            pixels, kept: as in `forward`.
            wanted: states to return beside the result, counted from 0 (the embeddings).
            samples: a number [B] that is each sample's own in the whole run: drop path follows
                it, so that every layout drops the same. None: it draws.

        Returns:
            [1 + patches, B, D] (or with 1 + K) where the tower ends, and the wanted states that
            are made here, of that shape.
        """
        if self.starts:
            tokens = self._embed(pixels, kept).transpose(0, 1).contiguous()
        assert tokens is not None, "the stage before returned nothing"
        length = 1 + (kept.shape[1] if kept is not None else self._patch_count(pixels))
        real = None
        if self.decoder.padding(length, len(pixels)):
            real = torch.tensor(length)
        return self.decoder.through(
            tokens,
            length,
            wanted=wanted,
            mask=real,
            context=self._draws(len(pixels), samples, pixels.device),
        )

    def _patch_count(self, pixels: Tensor) -> int:
        side = self.vit_config.patch_px
        return (pixels.shape[2] // side) * (pixels.shape[3] // side)

    def _draws(self, batch: int, samples: Tensor | None, device: torch.device) -> Tensor | None:
        """What decides which branches are dropped: [B, depth, 2], or None where nothing is."""
        shape = (self.vit_config.depth, 2)
        if not (self.training and self.vit_config.drop_path):
            return None
        if samples is None:
            return torch.rand(batch, *shape, device=device)
        return uniforms(samples, shape)

    def _embed(self, pixels: Tensor, kept: Tensor | None) -> Tensor:
        patches, grid = self._patches(pixels)
        positions = self.positions(*grid)
        batch = pixels.shape[0]
        if kept is not None:
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
            place = positions[1:][kept]  # [B, K, D]
        else:
            place = positions[1:].expand(batch, -1, -1)
        tokens = linear(patches, self.patch_embedding.weight, self.patch_embedding.bias) + place
        first = (self.class_embedding + positions[0]).expand(batch, 1, -1)
        return torch.cat([first, tokens], 1)

    def _patches(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, 3, height, width] -> [B, patches, 3*P*P]: a convolution as one matrix product."""
        side = self.vit_config.patch_px
        batch, _, height, width = pixels.shape
        if height % side or width % side:
            raise ModelError(
                f"images are {height}x{width} px; both sides must be multiples of {side} px"
            )
        rows, columns = height // side, width // side
        blocks = pixels.view(batch, 3, rows, side, columns, side)
        flat = blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return flat.to(self.patch_embedding.weight.dtype), (rows, columns)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding [1 + rows*columns, D]; another grid than the config's is bicubic."""
        side = self.vit_config.image_px // self.vit_config.patch_px
        if (rows, columns) == (side, side):
            return self.position_embedding
        grid = self.position_embedding[1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
        grid = interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        flat = grid.permute(0, 2, 3, 1).reshape(rows * columns, -1)
        return torch.cat([self.position_embedding[:1], flat.to(self.position_embedding.dtype)])

    def _set_init_rules(self) -> None:
        config = self.vit_config
        set_init(self, config.matrix_std)
        position_std = config.position_init_std or config.matrix_std
        if self.starts:
            set_rule(self.class_embedding, "trunc_normal", position_std)
            set_rule(self.position_embedding, "trunc_normal", position_std)
        layers: Any = self.decoder.layers
        for layer in layers:
            set_rule(layer.ls1, "constant", config.layerscale_init)
            set_rule(layer.ls2, "constant", config.layerscale_init)
            self._set_true_shapes(layer.self_attention)

    def _set_true_shapes(self, attention: Any) -> None:
        """Heads padded for tensor parallelism are no part of a canonical checkpoint."""
        width = self.vit_config.width
        if self.config.num_attention_heads == self.vit_config.heads:
            return
        set_true_shape(attention.linear_qkv.weight, 3 * width, width)
        if self.vit_config.qkv_bias:
            set_true_shape(attention.linear_qkv.bias, 3 * width)
        set_true_shape(attention.linear_proj.weight, width, width)
        if self.vit_config.qk_norm:
            set_true_shape(attention.q_layernorm.weight, width)
            set_true_shape(attention.k_layernorm.weight, width)


def _stack_config(config: InternViTConfig, spec: LayerSpecKind):
    return stack_config(
        spec,
        num_layers=config.depth,
        hidden_size=config.width,
        num_attention_heads=pad_to_multiple(config.heads, tensor_group().size()),
        kv_channels=config.head_size,
        ffn_hidden_size=config.mlp_hidden,
        add_bias_linear=True,
        add_qkv_bias=config.qkv_bias,
        normalization="RMSNorm" if config.norm == "rms" else "LayerNorm",
        layernorm_epsilon=config.eps,
        activation_func=torch.nn.functional.gelu,
    )


def _layer_spec(config: InternViTConfig, parts: Parts) -> ModuleSpec:
    submodules = layer_submodules(
        parts,
        norm=config.norm,
        causal=False,
        qkv_bias=config.qkv_bias,
        lora=config.lora,
        full_norm_width=config.width if config.qk_norm else None,
    )
    return ModuleSpec(
        module=ScaledLayer, submodules=submodules, params={"drop_paths": config.drop_paths}
    )
