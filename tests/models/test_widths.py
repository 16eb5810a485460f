"""Widths that FP8 cannot multiply are refused before anything starts, with the next that fits."""

import dataclasses

import pytest

from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.layout import Layout
from vlfoundry.infra.core.config import build, load_params
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.internvit.config import internvit
from vlfoundry.models.internvl.config import FLAVOURS, PARTS, InternVLConfig, internvl
from vlfoundry.models.internvl.pipeline_split import check_layout
from vlfoundry.models.layers.config import DecoderConfig

FP8 = Fp8Config()
EVERYWHERE = Fp8Config(first_layers=0, last_layers=0)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", PARTS)
def test_the_default_run_fits(kind, tensor):
    config = build(InternVLConfig, load_params()["model"])
    check_layout(kind, config, Layout(tensor=tensor), fp8=EVERYWHERE)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_the_paper_fits(tensor):
    for kind in ("internvl_c", "internvl_g", "chat_full"):
        check_layout(kind, internvl("paper"), Layout(tensor=tensor), fp8=FP8)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_fits_one_rank(flavour):
    config = internvl(flavour)
    kind = "chat_simple" if flavour.startswith(("chat", "internvl2")) else "internvl_c"
    check_layout(kind, config, Layout(), fp8=FP8)


def small(**changes) -> InternVLConfig:
    """Four layers a tower, whose widths fit."""
    return InternVLConfig(pool_heads=1, **{"text": DecoderConfig(depth=4), **changes})


@pytest.mark.parametrize(
    ("kind", "changes", "tensor", "message"),
    [
        ("vision", {"vision": internvit("small", width=72, heads=1)}, 1,
         r"vision: width 72 on 1 ranks is 72 a rank; FP8 multiplies multiples of 16, so the next "
         r"that fits is 80"),
        ("vision", {"vision": internvit("small", width=80, heads=10)}, 2,
         r"vision: heads x head size 80 on 2 ranks is 40 a rank; .* the next that fits is 96"),
        ("vision", {"vision": internvit("small", mlp_hidden=208)}, 2,
         r"vision: mlp_hidden 208 on 2 ranks is 104 a rank; .* the next that fits is 224"),
        ("text", {"text": DecoderConfig(depth=4, width=32, heads=8, key_value_heads=2)}, 2,
         r"text: \(heads \+ 2 x key_value_heads\) x head size 48 on 2 ranks is 24 a rank"),
        ("chat_simple", {"language": DecoderConfig(depth=3, mlp_hidden=344)}, 1,
         r"language: mlp_hidden 344"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(kind, changes, tensor, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(kind, small(**changes), Layout(tensor=tensor), fp8=FP8)


def test_heads_are_counted_with_their_padding():
    """Five heads of 16 on two ranks are six."""
    config = small(vision=internvit("small", width=80, heads=5))
    check_layout("vision", config, Layout(tensor=2), fp8=FP8)


def test_cross_attention_reads_the_vision_towers_width():
    config = small(vision=internvit("small", width=88, heads=1, depth=2))
    fp8 = Fp8Config(first_layers=1, last_layers=1)  # none of vision's two, two of text's four
    check_layout("internvl_c", config, Layout(), fp8=fp8)
    with pytest.raises(ConfigError, match=r"text: width of the vision tokens, .* 88 on 1 ranks"):
        check_layout("internvl_g", config, Layout(), fp8=fp8)


def test_fp8_for_no_layer_at_all_is_refused():
    config = dataclasses.replace(InternVLConfig(), text=DecoderConfig(depth=2))
    with pytest.raises(ConfigError, match=r"no layer of text would compute in FP8: .*'text': 2"):
        check_layout("text", config, Layout(), fp8=FP8)
    check_layout("text", config, Layout(), fp8=EVERYWHERE)
    check_layout("text", config, Layout())


def test_delayed_scales_leave_no_layer_out():
    """Transformer Engine refuses it on a GPU, so a laptop does."""
    with pytest.raises(ConfigError, match="set both to 0, or use the recipe tensorwise"):
        check_layout("internvl_c", internvl("paper"), Layout(), fp8=Fp8Config(recipe="delayed"))
