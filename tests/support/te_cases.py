"""The "te" layer spec against the local one, on Transformer Engine's stand-in.

`tests/models/test_te.py` runs these in a process of their own: whether Megatron sees Transformer
Engine is settled when it is imported.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

import vlfoundry.infra.backend
from tests.models import test_layouts as layouts
from tests.support.tiny_models import pixels, tiny_config
from vlfoundry.infra.backend import Layout, install
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.checkpoint import newest
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.loop import fit
from vlfoundry.infra.train.mfu import FlopCounter
from vlfoundry.infra.train.weights import gather_weights, pieces
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.config import LoraConfig
from vlfoundry.models.objectives.next_token import TextObjective

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0, linears=("qkv", "fc2"))
ADAPTED = tiny_config().with_lora(vision=LORA, text=LORA, language=LORA)
NORMS = dataclasses.replace(
    tiny_config().vision, norm="layer", qkv_bias=True, qk_norm=False, heads=4, depth=3
)


def use(spec: str) -> None:
    """Let `build` make models of this spec from now on, in this process."""
    vlfoundry.infra.backend._installed = dataclasses.replace(install(), layer_spec=spec)


def shapes_and_cuts(spec: str, kind: str, config, layout: Layout):
    """Of all parameters and all that a checkpoint would hold of them."""
    use(spec)
    with parallel(layout):
        model = build(kind, config, seed=3)
        names = {name: tuple(p.shape) for name, p in model.named_parameters()}
        cuts = {p.name: (p.shape, p.offset, p.size, p.is_main) for p in pieces(model)}
        sharded = model.sharded_state_dict()
        whole = {key: (part.key, part.replica_id) for key, part in sharded.items()}
        return names, cuts, whole, set(model.state_dict())


@pytest.mark.parametrize("kind", ["internvl_c", "internvl_g", "chat_full", "adapted"])
def test_names_shapes_and_cuts_are_those_of_the_local_spec(kind):
    layout = Layout(tensor=2, sequence_parallel=True)
    config, kind = (ADAPTED, "chat_full") if kind == "adapted" else (tiny_config(), kind)
    expected, got = (
        run_ranks(shapes_and_cuts, spec, kind, config, layout, ranks=layout.ranks)
        for spec in ("local", "te")
    )
    assert got == expected


def gradients(spec: str, *args):
    use(spec)
    return layouts.gradients(*args)


_alone: dict = {}


def alone(stage: str, form=dict):
    if stage not in _alone:
        _alone[stage] = run_ranks(gradients, "local", stage, Layout(), form, ranks=1)[0]
    return _alone[stage]


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        ("generative", "TP1"),
        ("generative", "TP2+SP+recompute"),
        ("full", "TP2+SP+recompute"),
    ],
)
def test_gradients_are_those_of_the_local_spec(stage, layout):
    chosen = layouts.LAYOUTS[layout]
    terms, expected, _ = alone(stage)
    ranks = run_ranks(gradients, "te", stage, chosen, ranks=chosen.ranks)
    got_terms, got, _ = ranks[0]
    assert [padding for _, _, padding in ranks] == [0.0] * chosen.ranks
    assert got_terms == pytest.approx(terms, rel=1e-5)
    assert layouts.worst_difference(got, expected) <= 1e-5


@pytest.mark.parametrize("stage", ["text", "simple"])
def test_packed_samples_are_those_of_the_local_spec(stage):
    terms, expected, _ = alone(stage)
    got_terms, got, _ = run_ranks(gradients, "te", stage, Layout(), layouts.packed, ranks=1)[0]
    assert got_terms == pytest.approx(terms, rel=1e-5)
    assert layouts.worst_difference(got, expected) <= 1e-5


def vision_gradients(spec: str, config: InternViTConfig, fp8: Fp8Config | None = None):
    """Of an encoder's mean square, and which attention its first layer took."""
    use(spec)
    whole = tiny_config(vision=config)
    with parallel(Layout(), fp8=fp8):
        model = build("vision", whole, seed=3)
        out = model.vision(pixels(3))
        out.square().mean().backward()
        core = model.vision.decoder.layers[0].self_attention.core_attention
        for parameter in model.parameters():
            parameter.data = parameter.grad.clone()
        found = {name: tensor.numpy() for name, tensor in gather_weights(model).items()}
        return out.detach().numpy(), found, getattr(core, "fused", None) and core.fused.seen


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}])
def test_layer_norms_biases_and_adapters(changes):
    config = dataclasses.replace(NORMS, **changes)
    out, expected, _ = run_ranks(vision_gradients, "local", config, ranks=1)[0]
    got_out, got, masks = run_ranks(vision_gradients, "te", config, ranks=1)[0]
    np.testing.assert_allclose(got_out, out, rtol=1e-4, atol=1e-5)
    assert layouts.worst_difference(got, expected) <= 1e-5
    assert masks == ["no_mask"]


def flops(layout: Layout):
    """FLOPs of an encoder's step: seen by PyTorch, and told to the counter."""
    use("te")
    with parallel(layout):
        model = build("vision", tiny_config(), seed=3).vision.train()
        with FlopCounter() as counter:
            model(pixels(3)).square().mean().backward()
        return counter.get_total_flops() - counter.unseen, counter.unseen


@pytest.mark.parametrize("layout", ["TP1", "TP2+SP", "recompute"])
def test_flops_out_of_sight_are_told(layout):
    """The stand-in computes with PyTorch's operators, so that here all of them are seen as well."""
    chosen = layouts.LAYOUTS[layout]
    vision = tiny_config().vision
    patches = 3 * vision.patches * 3 * vision.patch_px**2 * vision.width
    # 17 tokens become 18, which is a mask for PyTorch's attention: 3 heads of 4 channels a rank.
    attention = 3 * 3 * vision.depth * 4 * 18 * 17 * 3 * 4 if chosen.sequence_parallel else 0
    for seen, told in run_ranks(flops, chosen, ranks=chosen.ranks):
        # Of patches forwards and the weight's gradient; the picture has none.
        assert told == seen - 2 * 2 * patches - attention


def in_fp8(layout: Layout, fp8: Fp8Config):
    """Tokens and recipe of every call of the linears, by name."""
    use("te")
    config = tiny_config()
    vision = dataclasses.replace(config.vision, depth=4)
    text = dataclasses.replace(config.text, depth=4)
    config = dataclasses.replace(config, vision=vision, text=text)
    seen = {}
    original = layouts.model_config, layouts.parallel
    layouts.model_config = lambda: config
    layouts.parallel = lambda chosen: original[1](chosen, fp8=fp8)
    try:
        keep = layouts.gather_weights
        models = []
        layouts.gather_weights = lambda model: models.append(model) or keep(model)
        layouts.gradients("generative", layout)
    finally:
        layouts.model_config, layouts.parallel = original
        layouts.gather_weights = keep
    for name, module in models[0].named_modules():
        if getattr(module, "seen", None) and hasattr(module, "weight"):
            seen[name] = module.seen
    return seen


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [("recompute", "tensorwise"), ("TP2+SP", "blockwise"), ("PP2", "tensorwise")],
)
def test_which_layers_are_in_fp8(layout, recipe):
    """By their place in the whole stack, on every pipeline rank; and tokens come in multiples."""
    chosen = layouts.LAYOUTS[layout]
    fp8 = Fp8Config(recipe=recipe, first_layers=1, last_layers=2)
    ranks = run_ranks(in_fp8, chosen, fp8, ranks=chosen.ranks)
    names = {"tensorwise": "CurrentScaling", "blockwise": "BlockScaling"}
    layers = set()
    for seen in ranks:
        for name, calls in seen.items():
            layer = int(name.partition("layers.")[2].partition(".")[0])
            layers.add((name.split(".")[0], layer))
            expected = names[recipe] if layer == 1 else None
            assert {recipe for _, recipe in calls} == {expected}, name
    assert layers == {(tower, layer) for tower in ("vision", "text") for layer in range(4)}


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_watched_step_tells_what_is_lost(tmp_path, recipe):
    fp8 = Fp8Config(recipe=recipe, first_layers=0, last_layers=0)
    run_ranks(curve, "te", tmp_path, 2, fp8, ranks=1)
    lines = (tmp_path / "steps.jsonl").read_text("utf-8").splitlines()
    last = json.loads(lines[-1])
    assert last["fp8_amax"] > 0
    assert 0 <= last["fp8_lost"] < 1
    assert last["fp8_lost_at"].rpartition(".")[2] in ("input", "weight", "gradient")


CURVE = TrainConfig(
    steps=4, batch_samples=layouts.SAMPLES, lr=1e-3, warmup_steps=2, save_every_steps=2
)


def curve(spec, work, steps, fp8=None):
    """Losses of a run that goes on from what lies in `work`, and its state in the end."""
    use(spec)
    config = dataclasses.replace(CURVE, steps=steps, fp8=fp8)
    with parallel(Layout(), fp8=fp8):
        model = build("text", layouts.model_config(), seed=3)
        result = fit(
            model, TextObjective(), lambda step: layouts.batch_of("text", None, step), config,
            work=work, run_key="k", layout=Layout(), log=lambda _: None,
        )  # fmt: skip
        linear = model.text.decoder.layers[1].mlp.linear_fc1
        scales = getattr(linear, "fp8_history", None), getattr(linear, "loaded", None)
        return [row["loss"] for row in result.history], scales


@pytest.mark.parametrize(("first", "then"), [("local", "te"), ("te", "local")])
def test_a_checkpoint_of_one_spec_is_one_of_the_other(first, then, tmp_path):
    """With optimizer and all: the run goes on as if nothing had been changed."""
    whole, _ = run_ranks(curve, first, tmp_path / "whole", 4, ranks=1)[0]
    begun, _ = run_ranks(curve, first, tmp_path / "cut", 2, ranks=1)[0]
    assert newest(tmp_path / "cut" / "checkpoints", "k", print).account.step == 2
    both, _ = run_ranks(curve, then, tmp_path / "cut", 4, ranks=1)[0]
    assert both[:2] == begun
    assert both == pytest.approx(whole, rel=1e-5)


def test_scales_of_the_delayed_recipe_are_in_checkpoints(tmp_path):
    fp8 = Fp8Config(recipe="delayed", first_layers=0, last_layers=0, amax_history=5)
    _, (history, loaded) = run_ranks(curve, "te", tmp_path, 2, fp8, ranks=1)[0]
    assert loaded is None
    assert len(history) == 5
    assert history[0] > 0
    _, (_, loaded) = run_ranks(curve, "te", tmp_path, 2, fp8, ranks=1)[0]
    assert torch.equal(loaded, history)


def test_borrowed_vectors_stay_the_norms_own_when_a_model_is_moved():
    def moved():
        use("te")
        with parallel(Layout()):
            model = build("vision", tiny_config(), seed=3).to(torch.float64)
            for layer in model.vision.decoder.layers:
                linear = layer.self_attention.linear_qkv
                assert linear.layer_norm_weight is layer.input_layernorm.weight
                assert linear.layer_norm_weight.dtype == torch.float64

    run_ranks(moved, ranks=1)
