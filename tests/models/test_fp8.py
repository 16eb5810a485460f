"""FP8: Transformer Engine's numbers, which products use them, what they do to gradients."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from tests.models.test_layouts import (
    SAMPLES,
    batch_of,
    model_config,
    share,
)
from tests.support.tiny_models import pixels
from vlfoundry.infra.backend import Layout, device_literals
from vlfoundry.infra.backend.fp8_config import MULTIPLE, Fp8Config
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.fp8 import Fp8Run
from vlfoundry.infra.train.step import Engine
from vlfoundry.infra.train.trainer import wrap
from vlfoundry.infra.train.weights import gather_weights
from vlfoundry.models.fp8.formats import (
    E4M3,
    E5M2,
    LARGEST,
    pad_tokens,
    round_,
    rounded_in_blocks,
)
from vlfoundry.models.fp8.products import DelayedScales, Fp8Product
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.config import LoraConfig
from vlfoundry.models.objectives.contrastive import Contrastive
from vlfoundry.models.objectives.generative import Generative

pytestmark = pytest.mark.slow

GOLDEN = np.load(Path(__file__).parent / "golden/fp8/te.npz")
RECIPES = tuple(MULTIPLE)
EVERYWHERE = {"first_layers": 0, "last_layers": 0}


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def cosines(found: dict, expected: dict) -> dict[str, float]:
    return {name: cosine(found[name], expected[name]) for name in expected}


# --- the formulas


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounding_is_that_of_the_format(dtype):
    """Every number of the format, what lies between, and what lies beyond."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = [numbers.lerp(numbers.roll(-1), share)[:-1] for share in (0.25, 0.5, 0.75)]
    x = torch.cat([numbers, *between, torch.tensor([1e9, -1e9, torch.inf, -torch.inf])])
    largest = LARGEST[dtype]
    assert torch.equal(round_(x.clone(), dtype), x.clamp(-largest, largest).to(dtype).float())
    assert round_(torch.tensor([torch.nan]), dtype).isnan()


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize(("role", "name"), [("input", "e4m3"), ("gradient", "e5m2")])
def test_tensorwise_is_transformer_engines(source, role, name):
    x = golden(f"x_{source}").to(getattr(torch, source))
    found = Fp8Product(Fp8Config()).quantise(role, x)
    bytes_ = golden(f"tensorwise_{source}_{name}_bytes").view(E4M3 if name == "e4m3" else E5M2)
    assert torch.equal(found.across, bytes_.float())
    assert found.unscale == golden(f"tensorwise_{source}_{name}_unscale")


@pytest.mark.parametrize("steps", [1, 16])
def test_delayed_is_transformer_engines(steps):
    scales = DelayedScales(steps)
    maxima = golden(f"delayed_{steps}_amax")
    for step, amax in enumerate(maxima):
        scales.note("input", amax[None])
        scales.update()
        assert torch.equal(scales.history[0], golden(f"delayed_{steps}_history")[step]), step
        # Its Python multiplies with the reciprocal, we divide as its kernel does.
        expected = golden(f"delayed_{steps}_scale")[step]
        assert float(scales.scale[0]) == pytest.approx(float(expected), rel=2**-23), step


@pytest.mark.parametrize(
    ("name", "block"), [("1x128", (1, 128)), ("128x1", (128, 1)), ("128x128", (128, 128))]
)
def test_blocks_are_transformer_engines(name, block):
    x = golden("blocks_x").bfloat16()
    unscale = golden(f"blocks_{name}_unscale")
    for side, size in enumerate(block):
        unscale = unscale.repeat_interleave(size, side).narrow(side, 0, x.shape[side])
    expected = golden(f"blocks_{name}_bytes").view(E4M3).float() * unscale
    assert torch.equal(rounded_in_blocks(x, *block), expected)


def test_delayed_scales_stand_still_during_a_step():
    scales = DelayedScales(4)
    for amax in (2.0, 8.0, 4.0):
        assert scales.note("gradient", torch.tensor([amax, -1.0])) == 1
    scales.update()
    assert scales.scale.tolist() == [1, 1, 57344 / 8]  # what nobody has seen stays as it is
    scales.note("gradient", torch.tensor([99.0]))
    scales.forget()
    scales.update()
    assert scales.scale.tolist() == [1, 1, 57344 / 8]


# --- one linear


def products(recipe: str, steps: int = 3):
    """(output, gradients of input, weight and bias) of a linear in FP8 and in fp32."""
    generator = torch.Generator().manual_seed(5)
    product = Fp8Product(Fp8Config(recipe=recipe))
    weight = torch.randn(48, 80, generator=generator) / 9
    bias = torch.randn(48, generator=generator)
    found = []
    for _ in range(steps):  # delayed scales begin at 1
        x = torch.randn(37, 3, 80, generator=generator)
        gradient = 1e-3 * torch.randn(37, 3, 48, generator=generator)
        found = []
        for multiply in (product, linear):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            out = multiply(*leaves)
            found.append((out.detach(), *torch.autograd.grad(out, leaves, gradient)))
        if product.delayed:
            product.delayed.update()
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_is_near_that_of_fp32(recipe):
    """111 tokens: no multiple of anything."""
    in_fp8, in_fp32 = products(recipe)
    for got, expected in zip(in_fp8, in_fp32, strict=True):
        assert got.shape == expected.shape
        assert cosine(got, expected) > 0.995
        assert float(got.norm() / expected.norm()) == pytest.approx(1, abs=0.01)
    assert not torch.equal(in_fp8[0], in_fp32[0])
    assert torch.equal(in_fp8[3], in_fp32[3])  # the bias is not quantised


def test_a_linear_is_three_products_of_quantised_operands():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(32, 64, generator=generator, requires_grad=True)
    weight = torch.randn(16, 64, generator=generator, requires_grad=True)
    gradient = torch.randn(32, 16, generator=generator)
    product = Fp8Product(Fp8Config())
    out = product(x, weight, None)
    got = out, *torch.autograd.grad(out, (x, weight), gradient)

    def back(role, tensor):
        operand = product.quantise(role, tensor.detach())
        return (operand.across.double() * operand.unscale.double()), operand

    (a, _), (b, _), (g, _) = back("input", x), back("weight", weight), back("gradient", gradient)
    for ours, exact in zip(got, (a @ b.T, g @ b, g.T @ a), strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_changes_nothing(recipe):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(45, 32, generator=generator)
    padded = pad_tokens(x, MULTIPLE[recipe])
    assert padded.shape == (128 if recipe == "blockwise" else 48, 32)
    assert torch.equal(padded[:45], x)
    assert not padded[45:].any()
    plain, more = (Fp8Product(Fp8Config(recipe=recipe)).quantise("input", t) for t in (x, padded))
    assert torch.equal(more.across[:45], plain.across)
    assert torch.equal(more.down[:45], plain.down)
    assert not more.across[45:].any()
    assert more.unscale == plain.unscale


def test_what_needs_no_gradient_gets_none():
    x, weight = torch.randn(16, 32), torch.randn(16, 32)
    product = Fp8Product(Fp8Config())
    assert not product(x, weight, None).requires_grad
    x.requires_grad_()
    out = product(x, weight, None)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.shape == x.shape
    assert weight.grad is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_may_be_expanded(recipe):
    """That of a sum has strides of 0."""
    x = torch.randn(16, 2, 32).transpose(0, 1).requires_grad_()
    Fp8Product(Fp8Config(recipe=recipe))(x, torch.ones(16, 32), None).sum().backward()
    # Not equal: 16 / (57,344 x 448) is rounded before or after the sum, as the processor has it.
    torch.testing.assert_close(x.grad, torch.full_like(x, 16))


def test_what_is_lost_is_counted():
    product = Fp8Product(Fp8Config())
    product.seen = {}
    x = torch.tensor([[448.0, 1e-4, -1e-4, 0.0]]).expand(16, 4)
    product.quantise("input", x)
    product.quantise("input", 2 * x)
    assert set(product.seen) == {"input"}
    seen = product.seen["input"]
    assert (seen.amax, seen.nonzero, seen.lost) == (896.0, 96, 64)


# --- models


def fp8_parts(kind: str, layout: Layout, fp8: Fp8Config) -> list[str]:
    with parallel(layout, fp8=fp8):
        config = model_config()
        lora = LoraConfig(rank=2)
        model = build(kind, config.with_lora(vision=lora, text=lora, language=lora))
        return [
            name
            for chunk in getattr(model, "chunks", [model])
            for name, module in chunk.named_modules()
            if getattr(module, "fp8_product", None) is not None
        ]


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)],
    ids=["one", "PP2", "interleaved"],
)
def test_the_linears_of_the_layers_in_the_middle(layout):
    """By their place in the whole stack, wherever it is cut; of heads, poolers, adapters none."""
    ranks = run_ranks(fp8_parts, "internvl_g", layout, Fp8Config(), ranks=layout.ranks)
    found = sorted(name for rank in ranks for name in rank)
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1",
               "mlp.linear_fc2")  # fmt: skip
    cross = [f"cross_attention.linear_{name}" for name in ("q", "k", "v", "proj")]
    assert found == sorted(
        [f"{t}.decoder.layers.{i}.{n}" for t in ("vision", "text") for i in (1, 2) for n in linears]
        + [f"text.decoder.layers.2.{name}" for name in cross]
    )


def test_outside_of_a_run_in_fp8_nothing_is():
    assert not run_ranks(fp8_parts, "internvl_c", Layout(), None, ranks=1)[0]
    model = build("internvl_c", model_config())
    assert not any(getattr(module, "fp8_product", None) for module in model.modules())


OBJECTIVES = {"internvl_c": ("contrastive", Contrastive), "internvl_g": ("generative", Generative)}


def gradients(
    kind: str,
    layout: Layout,
    fp8: Fp8Config | None,
    steps: int = 1,
    *,
    leave: bool = False,
    config: InternVLConfig | None = None,
    batch: Callable = batch_of,
):
    """Of the last of some steps that change no weights: terms, whole gradients (rank 0), delayed
    scales by name, and what was seen."""
    name, objective = OBJECTIVES[kind]
    with parallel(layout, fp8=fp8), device_literals():
        config = config or model_config()
        model = build(kind, config, seed=3)
        run = Fp8Run(model)
        if leave:
            run.leave()
        wrapped = [wrap(chunk) for chunk in getattr(model, "chunks", [model])]
        engine = Engine(model, wrapped, objective(), layout)
        terms = {}
        for step in range(steps):
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            run.begin_step(watched=True)
            terms = engine.gradients(share(batch(name, config, seed=step)))
            run.end_step()
        seen = run.seen()
        engine.finalise(everywhere=True)
        for parameter in model.parameters():
            parameter.data = getattr(parameter, "main_grad", torch.zeros_like(parameter))
        whole = gather_weights(model)
        state = {n: t.data.clone().numpy() for n, t in run.sharded_state_dict().items()}
    tensors = {name: tensor.numpy() for name, tensor in (whole or {}).items()}
    return terms, tensors, state, seen


def by_layer(tensors: dict) -> dict[str, np.ndarray]:
    """One vector a layer, and one for each part that is in no layer."""
    parts: dict[str, list] = {}
    for name, tensor in tensors.items():
        before, layers, after = name.partition("layers.")
        key = f"{before}{layers}{after.partition('.')[0]}" if layers else name.partition(".")[0]
        parts.setdefault(key, []).append(tensor.ravel())
    return {key: np.concatenate(found) for key, found in parts.items()}


def noise_and_words(_stage: str, config: InternVLConfig, seed: int) -> dict[str, torch.Tensor]:
    """Pictures and captions of the model's own sizes."""
    generator = torch.Generator().manual_seed(seed)
    side, words = config.vision.image_px, (SAMPLES, 12)
    ids = torch.randint(12, config.text.vocab_size, words, generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    return {"pixels": pixels(SAMPLES, side, seed), "ids": ids, "mask": torch.ones_like(ids)}


# The model of params.yaml at its beginning, whose vision tower has layers in FP8.
SMALL = partial(gradients, config=InternVLConfig(embed_dim=768), batch=noise_and_words)


def test_gradients_point_where_those_of_fp32_do():
    def of(fp8: Fp8Config | None) -> dict[str, np.ndarray]:
        return by_layer(run_ranks(SMALL, "internvl_c", Layout(), fp8, 2, ranks=1)[0][1])

    expected = of(None)
    for recipe in RECIPES:
        found = cosines(of(Fp8Config(recipe=recipe)), expected)
        assert 0.99 < min(found.values()) < 0.99999, (recipe, found)


def test_left_it_is_a_model_that_never_was_in_fp8():
    left = run_ranks(
        lambda: gradients("internvl_c", Layout(), Fp8Config(**EVERYWHERE), leave=True), ranks=1
    )[0]
    plain = run_ranks(gradients, "internvl_c", Layout(), None, ranks=1)[0]
    assert left[0] == plain[0]
    assert all(np.array_equal(left[1][name], plain[1][name]) for name in plain[1])


PIPELINES = {
    "PP2": Layout(pipeline=2, micro_batch_samples=2),
    "PP2+recompute": Layout(pipeline=2, micro_batch_samples=2, recompute=True),
}


@pytest.mark.parametrize(
    ("recipe", "kind", "layout"),
    [
        ("tensorwise", "internvl_g", "PP2"),
        ("blockwise", "internvl_c", "PP2"),
        ("delayed", "internvl_c", "PP2+recompute"),
    ],
)
def test_pipelines_and_recomputing_change_no_bit(recipe, kind, layout):
    """Nor do they change a delayed scale: what goes through a layer twice counts once."""
    fp8 = Fp8Config(recipe=recipe, amax_history=2, **EVERYWHERE)
    same = Layout(micro_batch_samples=2)
    terms, expected, state, _ = run_ranks(gradients, kind, same, fp8, 2, ranks=1)[0]
    ranks = run_ranks(gradients, kind, PIPELINES[layout], fp8, 2, ranks=2)
    assert ranks[0][0] == terms
    assert [n for n in expected if not np.array_equal(expected[n], ranks[0][1][n])] == []
    states = ranks[0][2] | ranks[1][2]
    assert states.keys() == state.keys()
    assert bool(state) == (recipe == "delayed")
    assert all(np.array_equal(states[name], state[name]) for name in state)


def test_two_passes_are_one_step_to_delayed_scales():
    """Micro-batches have other maxima each, but the largest of them is that of the whole batch."""
    fp8 = Fp8Config(recipe="delayed", amax_history=2, **EVERYWHERE)
    whole = run_ranks(gradients, "internvl_c", Layout(), fp8, ranks=1)[0][2]
    parts = run_ranks(gradients, "internvl_c", Layout(micro_batch_samples=2), fp8, ranks=1)[0][2]
    for name, expected in whole.items():
        np.testing.assert_allclose(parts[name], expected, rtol=1e-4)


TENSOR = {"TP2": Layout(tensor=2), "TP2+SP": Layout(tensor=2, sequence_parallel=True)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_ranks_agree(recipe):
    """Delayed scales are those of one rank but for what sums in another order change, and equal on
    both ranks; so are blocks. `tensorwise` scales what a rank holds of a tensor: other numbers, as
    near to fp32's."""
    fp8 = Fp8Config(recipe=recipe, amax_history=4)
    _, expected, state, _ = run_ranks(SMALL, "internvl_c", Layout(), fp8, 2, ranks=1)[0]
    found = {}
    for name in ("TP2", "TP2+SP") if recipe == "tensorwise" else ("TP2+SP",):
        layout = TENSOR[name]
        first, second = run_ranks(SMALL, "internvl_c", layout, fp8, 2, ranks=2)
        assert all(np.array_equal(second[2][n], first[2][n]) for n in first[2])
        for tensor, scales in state.items():
            np.testing.assert_allclose(first[2][tensor][:2], scales[:2], rtol=1e-3)
            np.testing.assert_allclose(first[2][tensor][2], scales[2], rtol=0.05)
        found[name] = by_layer(first[1])
        near = 0.99 if recipe == "tensorwise" else 0.999
        assert min(cosines(found[name], by_layer(expected)).values()) > near
    if recipe == "tensorwise":
        assert min(cosines(found["TP2+SP"], found["TP2"]).values()) > 0.9999


def column_and_row(sequence_parallel: bool):
    """Output and gradients of fc2(fc1(x)) of a layer, on this rank."""
    layout = Layout(tensor=2, sequence_parallel=sequence_parallel)
    with parallel(layout, fp8=Fp8Config(**EVERYWHERE)):
        config = model_config()
        config = dataclasses.replace(
            config, text=dataclasses.replace(config.text, width=32, mlp_hidden=48)
        )
        model = build("text", config, seed=3)
        mlp = model.text.decoder.layers[0].mlp
        rank = torch.distributed.get_rank()
        x = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(1))
        x[6, 1, 3] = 9.0  # the largest is on the second rank
        mine = x.chunk(2)[rank].clone() if sequence_parallel else x.clone()
        out, _ = mlp.linear_fc1(mine.requires_grad_())
        gradient = torch.randn(8, 2, out.shape[-1], generator=torch.Generator().manual_seed(2))
        (x_grad,) = torch.autograd.grad(out, mine, gradient)
        return out.detach().numpy(), x_grad.numpy(), mlp.linear_fc1.weight.detach().numpy()


def test_a_column_linear_scales_each_ranks_rows_and_all_tokens():
    """As Transformer Engine: the input is quantised as a whole, also where ranks hold parts of it;
    the weight and the gradient of the output as what each rank holds."""
    whole = run_ranks(column_and_row, False, ranks=2)
    parts = run_ranks(column_and_row, True, ranks=2)
    x = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(1))
    x[6, 1, 3] = 9.0
    x_grad = np.zeros_like(x)
    for (out, _, weight), (out_of_parts, _, _) in zip(whole, parts, strict=True):
        product = Fp8Product(Fp8Config())
        leaf = x.clone().requires_grad_()
        expected = product(leaf, torch.from_numpy(weight), None)
        assert np.array_equal(out, expected.detach().numpy())
        assert np.array_equal(out_of_parts, out)
        gradient = torch.randn(*out.shape, generator=torch.Generator().manual_seed(2))
        x_grad += torch.autograd.grad(expected, leaf, gradient)[0].numpy()
    np.testing.assert_allclose(whole[0][1], x_grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), x_grad, rtol=1e-5, atol=1e-6)


def test_what_is_seen_names_the_worst_tensor():
    seen = run_ranks(gradients, "internvl_c", Layout(), Fp8Config(**EVERYWHERE), ranks=1)[0][3]
    assert set(seen) == {"fp8_amax", "fp8_lost", "fp8_lost_at"}
    assert 0 < seen["fp8_amax"] < 1e4
    assert 0 <= seen["fp8_lost"] < 0.5
    tower, *_, role = seen["fp8_lost_at"].split(".")
    assert tower in ("vision", "text")
    assert role in ("input", "weight", "gradient")
