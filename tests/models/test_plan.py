"""The planner's arithmetic, held against models, Megatron's buffers and autograd."""

import dataclasses

import pytest
import torch

from tests.support.tiny_models import on_meta, pixels, tiny_config
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.mfu import counted_flops
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.estimate.activations import (
    Kept,
    around_bytes,
    behind_bytes,
    input_bytes,
    pass_bytes,
)
from vlfoundry.models.estimate.compute import pass_flops, patch_flops, sample_flops
from vlfoundry.models.estimate.memory import (
    gradient_elements,
    memory,
    optimizer_bytes,
    rank_weights,
    step_seconds,
)
from vlfoundry.models.estimate.search import Machine, search
from vlfoundry.models.estimate.weights import weights
from vlfoundry.models.estimate.workload import Workload
from vlfoundry.models.internvit.config import DESIGN_SEARCH, InternViTConfig, internvit
from vlfoundry.models.internvl.config import FLAVOURS, PARTS, InternVLConfig, internvl
from vlfoundry.models.internvl.freeze import freeze
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.config import DecoderConfig, LoraConfig
from vlfoundry.models.objectives.contrastive import Contrastive
from vlfoundry.models.objectives.generative import Generative, GenerativeConfig
from vlfoundry.models.objectives.next_token import ChatObjective, TextObjective
from vlfoundry.models.objectives.retrieval import Retrieval
from vlfoundry.models.qllama.config import QLlamaConfig

pytestmark = pytest.mark.slow

BATCH, TEXT = 4, 24
ROW_TOLERANCE = 0.04
"""layers: per-token numbers (norms' scales, attention's sums) and rotary angles are left out"""
STEP_TOLERANCE = 0.06
"""whole objectives: heads' and losses' vectors are left out as well"""


def medium(**changes) -> InternVLConfig:
    """Wide enough that what the formulas leave out is small, as it is in a real model."""
    fields = {
        "vision": InternViTConfig(
            width=120, depth=3, heads=5, mlp_hidden=480, image_px=64, init_std=0.1
        ),
        "text": DecoderConfig(vocab_size=256, width=128, depth=3, heads=4, mlp_hidden=352),
        "language": DecoderConfig(
            vocab_size=320, width=128, depth=2, heads=4, key_value_heads=2, mlp_hidden=352
        ),
        "queries": QLlamaConfig(num_queries=8),
        "embed_dim": 64,
        "pool_heads": 4,
    }
    return InternVLConfig(**(fields | changes))


def with_head_norms(**changes) -> InternVLConfig:
    """Norms of heads, whose channels together are more than a token's."""
    norms = {"qk_norm": True, "head_dim": 48, **changes}
    base = medium()
    return medium(
        text=dataclasses.replace(base.text, **norms),
        language=dataclasses.replace(base.chat, **norms),
    )


def workload(objective: str, config: InternVLConfig | None = None, **changes) -> Workload:
    config = config or medium()
    kinds = {
        "text": "text", "contrastive": "internvl_c", "generative": "internvl_g",
        "retrieval": "internvl_g", "chat": "chat_simple",
    }  # fmt: skip
    kind = changes.pop("kind", kinds[objective])
    tokens = TEXT + (config.visual_tokens(kind) if objective == "chat" else 0)
    fields = {
        "kind": kind, "config": config, "objective": objective, "batch_samples": BATCH, "steps": 1,
        "text_tokens": tokens,
    }  # fmt: skip
    return Workload(**(fields | changes))


def batch_of(work: Workload) -> dict[str, torch.Tensor]:
    """Full rows, all labelled: what the planner assumes."""
    generator = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> torch.Tensor:
        return torch.randint(12, 200, (BATCH, tokens), generator=generator)

    batch = {}
    if "vision" in work.parts:
        batch["pixels"] = pixels(BATCH, side=work.config.vision.image_px)
    if work.objective == "chat":
        words = ids(work.text_tokens)
        words[:, : work.config.visual_tokens(work.kind)] = 5
        return batch | {"ids": words, "labels": words.clone()}
    full = torch.ones(BATCH, TEXT, dtype=torch.long)
    if work.objective in ("text", "contrastive"):
        return batch | {"ids": ids(TEXT), "mask": full}
    for name in ("positive", "negative", "summary", "caption"):
        batch |= {f"{name}_ids": ids(TEXT), f"{name}_mask": full}
    return batch | {"caption_labels": batch["caption_ids"]}


def objective_of(work: Workload):
    return {
        "text": TextObjective,
        "contrastive": Contrastive,
        "generative": lambda: Generative(
            GenerativeConfig(negatives="hard" if work.hard_negatives else "given")
        ),
        "retrieval": Retrieval,
        "chat": ChatObjective,
    }[work.objective]()


def saved_bytes(model: torch.nn.Module, forward) -> int:
    """Bytes of the distinct storages that autograd keeps of `forward()`, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "kind"),
    [("paper", kind) for kind in PARTS] + [(name, "chat_simple") for name in FLAVOURS],
)
def test_every_parameter_has_its_name_and_shape(flavour, kind):
    _assert_same_shapes(kind, internvl(flavour))


@pytest.mark.parametrize("kind", PARTS)
def test_adapters_and_tied_heads_too(kind):
    config = tiny_config().with_lora(
        vision=LoraConfig(rank=2), text=LoraConfig(rank=3), language=LoraConfig(linears=("qkv",))
    )
    _assert_same_shapes(kind, config)
    tied = dataclasses.replace(config.text, tied_head=True)
    _assert_same_shapes(kind, dataclasses.replace(config, text=tied, language=tied))
    _assert_same_shapes(kind, with_head_norms())


def _assert_same_shapes(kind: str, config: InternVLConfig) -> None:
    model = on_meta(lambda: build(kind, config))
    assert {w.name: w.shape for w in weights(kind, config)} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("name", DESIGN_SEARCH)
def test_published_sizes_and_compute_of_the_design_search(name):
    published = {
        "search-1": (6050.974, 1571.2), "search-2": (5902.794, 1536.6),
        "search-3": (5902.794, 1536.6), "search-4": (5984.846, 1553.3),
        "search-5": (6094.677, 1589.4), "search-6": (5985.326, 1563.8),
    }  # fmt: skip
    config = dataclasses.replace(internvl("paper"), vision=internvit(name), pool_heads=1)
    work = workload("contrastive", config)
    size = sum(weight.elements for weight in weights("vision", config))
    assert (round(size / 1e6, 3), round(vision_flops(work) / 2e9, 1)) == published[name]


def vision_flops(work: Workload) -> float:
    """Of one image, forwards through the tower."""
    return patch_flops(work) + pass_flops(work, work.passes[0]).forward


# --- compute --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("text", {}),
        ("contrastive", {}),
        ("contrastive", {"trained": ("vision", "clip_projector", "logit_scale")}),
        ("generative", {}),
        ("generative", {"trained": ("stage2",)}),
        ("generative", {"trained": ("stage2",), "hard_negatives": True}),
        ("retrieval", {}),
        ("chat", {}),
        ("chat", {"trained": ("connector",)}),
        ("chat", {"trained": ("connector", "vision.position_embedding")}),
        ("chat", {"trained": ("sft",), "kind": "chat_full"}),
        ("chat", {"config": medium(connector=ConnectorConfig(select_layer=-3))}),
        ("chat", {"config": with_head_norms()}),
        ("chat", {"config": medium().with_lora(language=LoraConfig()), "trained": ("lora",)}),
        ("chat", {"config": medium().with_lora(vision=LoraConfig()), "trained": ("lora",)}),
    ],
)
def test_flops_are_those_that_are_counted(objective, changes):
    work = workload(objective, **changes)
    model = build(work.kind, work.config)
    freeze(model, work.trained)
    counted = counted_flops(model, objective_of(work), batch_of(work)) / BATCH
    assert sample_flops(work).total == pytest.approx(counted, rel=0.002)


@pytest.mark.parametrize(("side_px", "tera"), [(224, 3.073), (336, 7.013), (448, 12.741)])
def test_flops_of_an_image_through_internvit_6b(side_px, tera):
    config = internvl("paper", vision=internvit("6b", image_px=side_px))
    work = workload("contrastive", config)
    assert vision_flops(work) == pytest.approx(tera * 1e12, rel=1e-3)


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"drop_path": 0.1}, {"norm": "layer", "qkv_bias": True, "qk_norm": False}],
    ids=["6b", "drop_path", "300m"],
)
def test_activations_of_internvit(dtype, changes):
    vision = dataclasses.replace(medium().vision, **changes)
    work = workload("contrastive", medium(vision=vision), kind="vision")
    model = build("vision", work.config).to(dtype).train()
    (step,) = [step for step in work.passes if step.stack == "vision"]
    x = torch.randn(step.tokens, BATCH, vision.width, dtype=dtype, requires_grad=True)
    got = saved_bytes(model, lambda: model.vision.decoder(x, attention_mask=None))
    kept = Kept(element=dtype.itemsize)
    assert sum(pass_bytes(work, step, BATCH, kept)) == pytest.approx(got, rel=ROW_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_qllama_s_queries_where_cross_attention_is_most(dtype):
    work = workload("chat", medium(), kind="chat_full")
    (step,) = [step for step in work.passes if step.stack == "text"]
    model = build("chat_full", work.config).to(dtype).train()
    vision = torch.randn(BATCH, step.context_tokens, 120, dtype=dtype, requires_grad=True)
    got = saved_bytes(model, lambda: model.text.encode_image(vision))
    kept = Kept(element=dtype.itemsize)
    counted = sum(pass_bytes(work, step, BATCH, kept)) + behind_bytes(work, step, BATCH, kept)
    assert counted == pytest.approx(got, rel=ROW_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("text", {}),
        ("contrastive", {}),
        ("contrastive", {"trained": ("vision", "clip_projector", "logit_scale")}),
        ("generative", {}),
        ("generative", {"trained": ("stage2",)}),
        ("chat", {}),
        ("chat", {"trained": ("connector",)}),
        ("chat", {"trained": ("sft",), "kind": "chat_full"}),
        ("chat", {"config": with_head_norms()}),
        ("chat", {"config": with_head_norms(), "trained": ("connector",)}),
        ("text", {"config": with_head_norms(key_value_heads=None)}),
        ("chat", {"config": medium().with_lora(language=LoraConfig()), "trained": ("lora",)}),
        ("chat", {"config": medium().with_lora(vision=LoraConfig()), "trained": ("lora",)}),
    ],
)
def test_activations_of_a_whole_step(dtype, objective, changes):
    work = workload(objective, **changes)
    model = build(work.kind, work.config).to(dtype).train()
    freeze(model, work.trained)
    batch, loss = batch_of(work), objective_of(work)
    got = saved_bytes(model, lambda: loss(model, batch))
    assert step_bytes(work, Kept(element=dtype.itemsize)) == pytest.approx(got, rel=STEP_TOLERANCE)


def step_bytes(work: Workload, kept: Kept) -> float:
    layers = sum(sum(pass_bytes(work, step, BATCH, kept)) for step in work.passes)
    return layers + around_bytes(work, BATCH, kept)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("objective", ["contrastive", "generative", "chat"])
def test_activations_of_each_tensor_rank(run_ranks, objective, sequence_parallel):
    def measure():
        work = workload(objective, medium())
        with parallel(Layout(tensor=2, sequence_parallel=sequence_parallel)):
            model = build(work.kind, work.config).train()
            batch, loss = batch_of(work), objective_of(work)
            return saved_bytes(model, lambda: loss(model, batch))

    work = workload(objective, medium())
    kept = Kept(tensor=2, sequence_parallel=sequence_parallel)
    for got in run_ranks(measure, ranks=2):
        assert step_bytes(work, kept) == pytest.approx(got, rel=STEP_TOLERANCE)


def test_activations_under_full_recomputation(run_ranks):
    work = workload("contrastive", medium())

    def measure():
        with parallel(Layout(recompute=True)):
            model = build(work.kind, work.config).train()
            batch, loss = batch_of(work), objective_of(work)
            return saved_bytes(model, lambda: loss(model, batch))

    kept = Kept()
    inputs = sum(step.layers * input_bytes(step, work, BATCH, kept) for step in work.passes)
    (got,) = run_ranks(measure, ranks=1)
    assert inputs + around_bytes(work, BATCH, kept) == pytest.approx(got, rel=STEP_TOLERANCE)


# --- weights, gradients and optimizer in Megatron's buffers ---------------------------------------


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(tensor=2)], ids=["data2", "tensor2"])
@pytest.mark.parametrize(
    ("objective", "trained"), [("contrastive", "all"), ("generative", "stage2")]
)
def test_parameters_gradients_and_optimizer_are_megatrons(run_ranks, layout, objective, trained):
    config = tiny_config()
    work = workload(objective, config, trained=(trained,))

    def measure():
        from vlfoundry.infra.backend import device_literals
        from vlfoundry.infra.train.optim import build_optimizer
        from vlfoundry.infra.train.trainer import wrap

        with parallel(layout), device_literals():
            model = build(work.kind, config)
            freeze(model, trained)
            wrapped = wrap(model)
            optimizer = build_optimizer([wrapped], TrainConfig(steps=1, batch_samples=2, lr=1e-3))
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.main_grad.fill_(1.0)
            optimizer.step()
            states = [
                value.untyped_storage().nbytes()
                for one in optimizer.chained_optimizers
                for state in one.optimizer.state.values()
                for key, value in state.items()
                if key in ("exp_avg", "exp_avg_sq")
            ]
            buffers = sum(buffer.grad_data.nbytes for buffer in wrapped.buffers)
            return sum(p.nbytes for p in wrapped.parameters()), buffers, sum(states)

    own = weights(work.kind, config, layout.tensor)
    sizes = [weight.elements for weight in own if weight.name in work.names]
    ranks = run_ranks(measure, ranks=2)
    for parameters, gradients, _ in ranks:
        assert parameters == 4 * sum(weight.elements for weight in own)
        assert gradients == 4 * gradient_elements(sizes, layout.data)
    states = sum(rank[2] for rank in ranks) / layout.tensor
    assert states == layout.data * optimizer_bytes(sum(sizes), layout.data, 4)


@pytest.mark.parametrize("kind", ["internvl_c", "internvl_g", "chat_full"])
@pytest.mark.parametrize(
    "layout",
    [Layout(pipeline=2), Layout(tensor=2), Layout(pipeline=2, virtual_pipeline=2)],
    ids=["pipeline", "tensor", "interleaved"],
)
def test_every_rank_holds_what_is_planned(run_ranks, layout, kind):
    deep = dataclasses.replace(tiny_config().text, depth=4)
    vision = dataclasses.replace(tiny_config().vision, depth=4)
    work = workload("generative", tiny_config(text=deep, vision=vision), kind=kind)

    def measure():
        from megatron.core import parallel_state

        with parallel(layout):
            model = build(kind, work.config)
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            return parallel_state.get_pipeline_model_parallel_rank(), shapes

    for rank, shapes in run_ranks(measure, ranks=2):
        assert shapes == {w.name: w.shape for w in rank_weights(work, layout, rank)}


# --- the whole of a rank, and the search ----------------------------------------------------------

H100 = Machine(ranks=64, memory_bytes=76 << 30, element=2, flops_per_s=989e12, mfu=0.4)


def stage1(**changes) -> Workload:
    fields = {
        "kind": "internvl_c", "config": internvl("paper"), "objective": "contrastive",
        "batch_samples": 163_840, "steps": 1, "text_tokens": 80,
    }  # fmt: skip
    return Workload(**(fields | changes))


def candidate(micro_batch: int = 8, **layout) -> Layout:
    return Layout(micro_batch_samples=micro_batch, **layout)


def test_bytes_of_a_parameter_are_6_and_12_over_the_data_ranks():
    need = memory(stage1(), candidate(data=64), element=2)
    size = 12_620_029_697
    assert need.parameters == 2 * size
    assert need.gradients == pytest.approx(4 * size, rel=1e-6)
    assert need.optimizer == 12 * size / 64


def test_25_heads_are_padded_on_the_tensor_ranks():
    whole, cut = (memory(stage1(), candidate(tensor=t), element=2).parameters for t in (1, 2))
    assert 1.003 < 2 * cut / whole < 1.02


def test_pipeline_ranks_share_the_layers_and_the_first_has_most_in_flight():
    plain = memory(stage1(), candidate(data=8), element=2)
    piped = memory(stage1(), candidate(pipeline=4, data=8), element=2)
    interleaved = memory(stage1(), candidate(pipeline=4, virtual_pipeline=2, data=8), element=2)
    assert piped.parameters < plain.parameters / 3
    # Embeddings of the whole batch aside, four ranks hold four micro-batches of a quarter each.
    embeddings = 16 * 163_840 * 768
    layers = piped.activations - embeddings
    assert layers == pytest.approx(plain.activations - embeddings, rel=0.02)
    # Narayanan et al. 2021: (1 + (p - 1) / (p v)) times as much.
    assert interleaved.activations - embeddings == pytest.approx(layers * (1 + 3 / 8), rel=0.01)


def test_recomputation_and_sequence_parallelism_keep_less():
    none, full = (memory(stage1(), candidate(recompute=r), element=2) for r in (False, True))
    assert full.activations < 0.15 * none.activations
    plain, cut = (
        memory(stage1(), candidate(tensor=2, sequence_parallel=s), element=2) for s in (False, True)
    )
    assert cut.activations < 0.8 * plain.activations


def test_step_time_counts_recomputation_both_passes_and_the_bubble():
    work = stage1(batch_samples=64)
    per = {"mfu": 0.5, "flops_per_s": 1e15}
    flops = sample_flops(work)
    once = step_seconds(work, candidate(64), **per)
    assert once == pytest.approx(64 * flops.total / 0.5e15)
    twice = step_seconds(work, candidate(32), **per)
    assert twice == pytest.approx(once * (flops.total + flops.forward) / flops.total)
    piped = step_seconds(work, candidate(8, pipeline=4), **per)
    assert piped == pytest.approx(twice / 4 * (1 + 3 / 8))
    again = step_seconds(work, candidate(64, recompute=True), **per)
    assert again == pytest.approx(once * 4 / 3, rel=0.01)


def test_the_slowest_pipeline_rank_sets_the_pace():
    work = workload(
        "text", batch_samples=64
    )  # three layers: one on the first rank, two on the other
    per = {"mfu": 0.5, "flops_per_s": 1e12}
    one, two = (step_seconds(work, candidate(8, pipeline=p), **per) for p in (1, 2))
    assert two == pytest.approx(one / 2 * (1 + 1 / 8) * 4 / 3)


def test_the_towers_of_stage_1_learn_one_after_the_other_in_two_passes():
    once, twice = (
        memory(stage1(batch_samples=size), candidate(8), element=2).activations - 16 * size * 768
        for size in (8, 16)
    )
    vision, text = (
        memory(stage1(batch_samples=16, **alone), candidate(8), element=2).activations
        - 16 * 16 * 768
        for alone in ({"captions": 0}, {"images": 0})
    )
    assert twice < once
    assert twice == pytest.approx(max(vision, text), rel=0.05)


def test_what_is_recommended_fits_and_is_the_fastest():
    plan = search(stage1(), H100)
    assert plan.best.memory.total <= H100.memory_bytes
    assert plan.best.seconds <= 1.01 * min(fit.seconds for fit in plan.fits)
    assert all(fit.layout.ranks == 64 for fit in plan.fits)


def test_layouts_that_do_not_fit_are_counted_by_reason():
    plan = search(stage1(), dataclasses.replace(H100, memory_bytes=20 << 30))
    assert plan.refused["memory"] > 10
    assert plan.refused["internvl_c: vision: 48 layers for more pipeline stages"] > 0
    nothing = search(stage1(), dataclasses.replace(H100, ranks=1))
    assert nothing.best is None
    assert nothing.refused == {"memory": 2}


def test_a_batch_that_does_not_divide_is_refused():
    plan = search(stage1(batch_samples=33), dataclasses.replace(H100, ranks=2))
    assert plan.refused["batch 33 does not divide by data"] == 1
