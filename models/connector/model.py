"""Connectors.

Letters: B images, T tokens, R rows, C columns, V vision width, D language width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import gelu

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models import kernels
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.layers.canonical import set_init, set_rule
from vlfoundry.models.layers.megatron import TransformerConfig
from vlfoundry.models.layers.norms import LayerNorm
from vlfoundry.models.layers.parallel import Part


class Connector(Part):
    """Patch tokens [B, T, V] (no class token) to language tokens."""

    def __init__(self, stack: TransformerConfig, config: ConnectorConfig, vision: int, width: int):
        super().__init__(stack)
        self.connector_config = config
        inner = vision * config.merge**2
        make = {"dtype": stack.params_dtype}
        self.norm = LayerNorm(stack, inner, eps=1e-5) if config.kind == "pixel_shuffle" else None
        self.linear1 = nn.Linear(inner, width, **make)
        self.linear2 = nn.Linear(width, width, **make)
        for linear in (self.linear1, self.linear2):
            set_init(
                linear, linear.in_features**-0.5 if config.init_std is None else config.init_std
            )
        if self.norm is not None:
            set_rule(self.norm.weight, "constant", 1.0)
            set_rule(self.norm.bias, "constant", 0.0)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """[B, T, V] -> [B, T / merge**2, D]. `grid` is (rows, columns); None: square."""
        if self.norm is not None:
            merges = self.connector_config.merge > 1
            tokens = self._shuffled_norm(tokens, grid, self.norm) if merges else self.norm(tokens)
        return self.linear2(gelu(self.linear1(tokens)))

    def _shuffled_norm(
        self, tokens: Tensor, grid: tuple[int, int] | None, norm: LayerNorm
    ) -> Tensor:
        rows, columns = grid or (math.isqrt(tokens.shape[1]),) * 2
        if rows * columns != tokens.shape[1]:
            raise ModelError(
                f"{tokens.shape[1]} patch tokens are no {rows}x{columns} grid; pass their grid"
            )
        merge, version = self.connector_config.merge, self.connector_config.ps_version
        _check_grid(rows, columns, merge)
        if kernels.use_kernels(tokens):
            from vlfoundry.models.kernels.unshuffle import shuffled_norm

            return shuffled_norm(
                tokens, (rows, columns), merge, norm.weight, norm.bias, norm.eps,
                swapped=version == "v1",
            )  # fmt: skip
        square = tokens.reshape(len(tokens), rows, columns, -1)
        return norm(pixel_shuffle(square, merge, version).flatten(1, 2))


def pixel_shuffle(tokens: Tensor, merge: int, version: str) -> Tensor:
    """[B, R, C, V] -> [B, R/merge, C/merge, V*merge**2]: each square's tokens in one, row by row.

    Version "v1" returns rows and columns swapped.
    """
    batch, rows, columns, width = tokens.shape
    _check_grid(rows, columns, merge)
    blocks = tokens.view(batch, rows // merge, merge, columns // merge, merge, width)
    merged = blocks.permute(0, 1, 3, 2, 4, 5).reshape(
        batch, rows // merge, columns // merge, width * merge**2
    )
    return merged.transpose(1, 2) if version == "v1" else merged


def _check_grid(rows: int, columns: int, merge: int) -> None:
    if rows % merge or columns % merge:
        raise ModelError(f"a {rows}x{columns} grid does not divide by {merge} for pixel shuffle")
