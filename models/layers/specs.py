"""What transformer layers are put together from, by layer spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlfoundry.infra.core.errors import LayoutError
from vlfoundry.models.layers.attention import SDPAttention
from vlfoundry.models.layers.config import LayerSpecKind
from vlfoundry.models.layers.linear import ColumnLinear, RowLinear, UnbiasedColumnLinear
from vlfoundry.models.layers.norms import LayerNorm, NormKind, RMSNorm

Maker = Callable[..., Any]
"""a class, called as Megatron calls the one that it stands for"""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Classes of one layer spec; parameters have the same names, shapes and cuts in all of them."""

    column: Maker
    """linear whose output features are cut over the tensor ranks"""
    unbiased_column: Maker
    """the same, never with a bias"""
    row: Maker
    """linear whose input features are cut"""
    attention: Maker
    """core attention"""
    norms: Mapping[NormKind, Maker]
    """norms that stand alone"""
    norm_column: Maker | None = None
    """a norm and a column linear in one; None: there is none"""
    norm_unbiased_column: Maker | None = None
    """the same, never with a bias"""


LOCAL = Parts(
    column=ColumnLinear,
    unbiased_column=UnbiasedColumnLinear,
    row=RowLinear,
    attention=SDPAttention,
    norms={"rms": RMSNorm, "layer": LayerNorm},
)


def parts_of(spec: LayerSpecKind) -> Parts:
    """The classes of a layer spec.

    Raises:
        LayoutError: it is Transformer Engine's, which is not installed.
    """
    if spec == "local":
        return LOCAL
    try:
        # Never only `transformer_engine`, which hides an extension that does not load.
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise LayoutError(
            f'layer spec "te" needs Transformer Engine, which cannot be imported here ({error}); '
            'install it, or use layer spec "local"'
        ) from error
    from vlfoundry.models.layers.transformer_engine import TE

    return TE
