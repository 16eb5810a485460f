"""The parity matrix: gradients and losses in every layout equal those of one rank."""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny_models import chat_batch, pixels, stage2_batch, texts, tiny_config
from vlfoundry.infra.backend import Layout, device_literals
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.core.errors import LayoutError
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.loop import fit
from vlfoundry.infra.train.step import Engine, pack, unpack
from vlfoundry.infra.train.trainer import wrap
from vlfoundry.infra.train.weights import Piece, gather_weights, pieces
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.freeze import freeze
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.pipeline_split import check_layout, split_layers
from vlfoundry.models.layers.packing import pack_rows
from vlfoundry.models.layers.parallel import data_group
from vlfoundry.models.objectives.contrastive import Contrastive, ContrastiveConfig
from vlfoundry.models.objectives.generative import Generative
from vlfoundry.models.objectives.next_token import ChatObjective, NextTokenConfig, TextObjective

pytestmark = pytest.mark.slow

SAMPLES = 8
LAYOUTS = {
    "TP1": Layout(),
    "micro-batches": Layout(micro_batch_samples=2),
    "recompute": Layout(recompute=True),
    "TP2": Layout(tensor=2),
    "TP2+SP": Layout(tensor=2, sequence_parallel=True),
    "TP2+SP+recompute": Layout(tensor=2, sequence_parallel=True, recompute=True),
    "PP2": Layout(pipeline=2, micro_batch_samples=2),
    "PP2+recompute": Layout(pipeline=2, micro_batch_samples=2, recompute=True),
    "PP2 interleaved": Layout(pipeline=2, virtual_pipeline=2, micro_batch_samples=2),
    "DP2": Layout(data=2),
    "DP2+micro-batches": Layout(data=2, micro_batch_samples=2),
    "TP2xPP2": Layout(tensor=2, pipeline=2, micro_batch_samples=2),
    "TP2xPP2+SP": Layout(tensor=2, pipeline=2, sequence_parallel=True, micro_batch_samples=2),
}
APART = {
    "TP2, text 1": Layout(tensor=2, text_tensor=1),
    "TP4, text 2": Layout(tensor=4, text_tensor=2),
    "TP2xDP2+SP, text 1": Layout(tensor=2, data=2, sequence_parallel=True, text_tensor=1),
    "TP2xPP2+SP, text 1": Layout(
        tensor=2, pipeline=2, sequence_parallel=True, text_tensor=1, micro_batch_samples=2
    ),
}
"""the text tower in a layout of its own: where the towers meet in the loss alone"""


def model_config() -> InternVLConfig:
    """Four layers a tower, so that each can be cut into four stages; five heads, as ever."""
    config = tiny_config()
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=4, drop_path=0.3),
        text=dataclasses.replace(config.text, depth=4),
    )


def batch_of(stage: str, config: InternVLConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The whole batch of a step."""
    numbers = {"samples": torch.arange(SAMPLES) + SAMPLES * seed}
    if stage in ("contrastive", "sigmoid"):
        ids, mask = texts(SAMPLES, seed=seed)
        ids[3], mask[3] = ids[0], mask[0]  # one caption of two images
        return {"pixels": pixels(SAMPLES, seed=seed), "ids": ids, "mask": mask, **numbers}
    if stage == "generative":
        return stage2_batch(SAMPLES, seed=seed) | numbers
    if stage == "text":
        ids, mask = texts(SAMPLES, seed=seed)
        return {"ids": ids, "mask": mask}
    batch = chat_batch(config, f"chat_{stage}", SAMPLES)
    batch["labels"][1, -2:] = -100  # micro-batches of unlike weight
    return batch | numbers


SIGMOID = ContrastiveConfig(loss="sigmoid")
STAGES = {
    "text": ("text", TextObjective),
    "contrastive": ("internvl_c", Contrastive),
    "generative": ("internvl_g", Generative),
    "simple": ("chat_simple", lambda: ChatObjective(NextTokenConfig(averaging="square"))),
    "full": ("chat_full", ChatObjective),
}
ALL_STAGES = STAGES | {"sigmoid": ("internvl_c", lambda: Contrastive(SIGMOID))}


def share(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This data-parallel rank's."""
    size = SAMPLES // data_group().size()
    start = data_group().rank() * size
    return {name: value[start : start + size] for name, value in batch.items()}


def build_model(stage: str, config: InternVLConfig):
    """What the stage trains."""
    model = build(ALL_STAGES[stage][0], config, seed=3)
    if stage == "generative":
        freeze(model, ["stage2", "text"])
    return model


def gradients(stage: str, layout: Layout, form=dict):
    """Terms of one step, whole gradients (on rank 0), and the largest of a dummy head's."""
    _, objective = ALL_STAGES[stage]
    with parallel(layout), device_literals():
        config = model_config().for_sigmoid() if stage == "sigmoid" else model_config()
        model = build_model(stage, config)
        wrapped = [wrap(chunk) for chunk in getattr(model, "chunks", [model])]
        engine = Engine(model, wrapped, objective(), layout)
        model.train()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        terms = engine.gradients(form(share(batch_of(stage, config))))
        engine.finalise(everywhere=True)
        for parameter in model.parameters():
            parameter.data = getattr(parameter, "main_grad", torch.zeros_like(parameter))
        padding = max(float(padding_of(piece).abs().max()) for piece in pieces(model))
        whole = gather_weights(model)
    tensors = {name: tensor.numpy() for name, tensor in (whole or {}).items()}
    return terms, tensors, padding


def padding_of(piece: Piece) -> torch.Tensor:
    """What is there only to divide by the tensor ranks; zero elsewhere."""
    held = piece.data.clone()
    held[tuple(slice(0, size) for size in piece.size)] = 0
    return held


_alone: dict = {}


def alone(stage: str, layout: Layout):
    """One rank's, with the same micro-batches: what the layout has to equal."""
    same = Layout(micro_batch_samples=layout.micro_batch_samples)
    if (stage, same) not in _alone:
        _alone[stage, same] = run_ranks(gradients, stage, same, ranks=1)[0]
    return _alone[stage, same]


GRADIENTS = [
    *itertools.product(STAGES, LAYOUTS),
    *itertools.product(["sigmoid"], ["PP2 interleaved", "DP2+micro-batches", "TP2xPP2+SP"]),
]
PACKED = [*itertools.product(["text", "simple", "full"], LAYOUTS)]
DATA_LAYOUTS = {
    "micro-batches": Layout(micro_batch_samples=3),
    "DP2": Layout(data=2),
    "DP2+micro-batches": Layout(data=2, micro_batch_samples=3),
}
assert len(LAYOUTS) % 3, "or every third cell would be of the same layouts in every stage"


@pytest.mark.parametrize(("stage", "layout"), GRADIENTS[::3])
def test_gradients_are_those_of_one_rank(stage, layout):
    """The other cells are in `make accept SUBJECT=engine`."""
    gradients_are_those_of_one_rank(stage, LAYOUTS[layout])


@pytest.mark.parametrize("layout", APART)
def test_each_tower_may_have_its_own_layout(layout):
    gradients_are_those_of_one_rank("contrastive", APART[layout])


def gradients_are_those_of_one_rank(stage: str, chosen: Layout) -> None:
    """Pipelines and recomputing change no bit; sums over ranks are rounded in another order."""
    terms, expected, _ = alone(stage, chosen)
    ranks = run_ranks(gradients, stage, chosen, ranks=chosen.ranks)
    got_terms, got, _ = ranks[0]
    assert [padding for _, _, padding in ranks] == [0.0] * chosen.ranks
    assert got.keys() == expected.keys()
    if chosen.tensor == chosen.data == 1:
        assert got_terms == terms
        assert [n for n in expected if not np.array_equal(expected[n], got[n])] == []
        return
    limit = 1e-5 if chosen.tensor > 1 else 1e-6
    assert got_terms == pytest.approx(terms, rel=limit, abs=limit)
    assert difference(got, expected) <= limit
    assert worst_difference(got, expected) <= 1e-5


def packed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same samples in two packs, the second the longer."""
    ids = batch["ids"]
    rows, cu_seqlens = pack_rows(ids, batch.get("mask", torch.ones_like(ids)))
    few = len(ids) // 2 - 1
    made = {"ids": rows, "cu_seqlens": cu_seqlens, "packs": torch.tensor([few, len(ids) - few])}
    if "pixels" not in batch:
        return made
    images = {name: batch[name] for name in ("pixels", "samples")}
    labels = batch["labels"].flatten()[None]
    return {**made, **images, "labels": labels, "tiles": torch.ones(len(ids), dtype=torch.long)}


@pytest.mark.parametrize(("stage", "layout"), PACKED[1::3])
def test_packed_gradients_are_those_of_padded_rows(stage, layout):
    """The other cells are in `make accept SUBJECT=engine`."""
    packed_gradients_are_those_of_padded_rows(stage, LAYOUTS[layout])


def packed_gradients_are_those_of_padded_rows(stage: str, chosen: Layout) -> None:
    terms, expected, _ = alone(stage, Layout())
    got_terms, got, _ = run_ranks(gradients, stage, chosen, packed, ranks=chosen.ranks)[0]
    assert got_terms == pytest.approx(terms, rel=1e-5)
    assert got.keys() == expected.keys()
    assert worst_difference(got, expected) <= 1e-5


def fp64_gradients(stage: str, layout: Layout):
    """Gradients of the same step in fp64, where rounding hides nothing: whole on every rank, for
    data-parallel layouts alone."""
    _, objective = ALL_STAGES[stage]
    with parallel(layout), device_literals():
        config = model_config().for_sigmoid() if stage == "sigmoid" else model_config()
        model = build_model(stage, config).double()
        wrapped = wrap(model, gradients="fp64")
        engine = Engine(model, [wrapped], objective(), layout)
        model.train()
        wrapped.zero_grad_buffer()
        batch = share(batch_of(stage, config))
        engine.gradients({n: v.double() if v.is_floating_point() else v for n, v in batch.items()})
        engine.finalise(everywhere=True)
        found = {n: p.main_grad for n, p in model.named_parameters() if hasattr(p, "main_grad")}
        assert {gradient.dtype for gradient in found.values()} == {torch.float64}
    return {name: gradient.numpy() for name, gradient in found.items()}


_in_fp64: dict = {}


def exact(stage: str) -> dict[str, np.ndarray]:
    """One rank's, the whole batch in one go."""
    if stage not in _in_fp64:
        _in_fp64[stage] = run_ranks(fp64_gradients, stage, Layout(), ranks=1)[0]
    return _in_fp64[stage]


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_micro_batches_and_data_ranks_are_exact(stage):
    """Both at once; each alone is in `make accept SUBJECT=engine`."""
    micro_batches_and_data_ranks_are_exact(stage, DATA_LAYOUTS["DP2+micro-batches"])


def micro_batches_and_data_ranks_are_exact(stage: str, layout: Layout) -> None:
    got = run_ranks(fp64_gradients, stage, layout, ranks=layout.ranks)[0]
    assert got.keys() == exact(stage).keys()
    assert worst_difference(got, exact(stage)) <= 1e-6


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_micro_batches_round_no_worse_than_the_whole_batch(stage):
    """fp32 gradients lie about 1e-6 from the exact ones, however the batch is cut."""
    _, whole, _ = alone(stage, Layout())
    _, got, _ = alone(stage, Layout(micro_batch_samples=3))
    assert difference(got, exact(stage)) <= 2 * difference(whole, exact(stage)) <= 1e-5


def difference(got: dict, expected: dict) -> float:
    """Of the gradient, all tensors as one vector, relative to its norm.

    Single tensors, of which some are sums of thousands of numbers that nearly cancel, may round
    further apart: on a processor whose matrix products depend on how many rows they have, 1.3e-6.
    """
    apart = sum(float(np.square(got[n] - g).sum()) for n, g in expected.items())
    return math.sqrt(apart / sum(float(np.square(g).sum()) for g in expected.values()))


def worst_difference(got: dict, expected: dict) -> float:
    """The largest over all tensors, relative to the tensor's own norm or, where that is nothing
    but rounding (a bias on keys shifts all scores of a query alike), to a thousandth of all's."""
    whole = np.sqrt(sum(float(np.square(g).sum()) for g in expected.values()))
    return max(
        float(np.linalg.norm(got[n] - g) / max(np.linalg.norm(g), 1e-3 * whole))
        for n, g in expected.items()
    )


def curve(stage: str, layout: Layout, work: Path, steps: int, optimizer: str = "adamw"):
    """Losses of a whole run, and its final weights on rank 0."""
    kind, objective = STAGES[stage]
    config = TrainConfig(
        steps=steps, batch_samples=SAMPLES, lr=1e-3, warmup_steps=2, save_every_steps=2,
        keep_checkpoints=steps, optimizer=optimizer,
    )  # fmt: skip
    with parallel(layout):
        model_of = model_config()
        model = build(kind, model_of, seed=3)
        result = fit(
            model, objective(), lambda step: share(batch_of(stage, model_of, step)), config,
            work=work, run_key="k", layout=layout, log=lambda _: None,
        )  # fmt: skip
        whole = gather_weights(model)
    weights = {name: tensor.numpy() for name, tensor in (whole or {}).items()}
    return [row["loss"] for row in result.history], weights


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        ("contrastive", "TP2xPP2"),
        ("generative", "PP2 interleaved"),
        ("full", "DP2"),
    ],
)
def test_loss_curves_agree(stage, layout, tmp_path):
    """`make accept SUBJECT=engine` goes 20 steps with every objective in every layout."""
    loss_curves_agree(stage, LAYOUTS[layout], tmp_path, steps=4)


def test_loss_curves_agree_where_each_tower_has_its_own_layout(tmp_path):
    """By the optimizer that sums over ranks; Megatron's is in `make accept SUBJECT=engine`."""
    chosen = APART["TP2xDP2+SP, text 1"]
    loss_curves_agree("contrastive", chosen, tmp_path, steps=4, optimizer="stable_adamw")


def test_goes_on_where_each_tower_has_its_own_layout(tmp_path):
    """The optimizer's state of the text tower is another rank's part in each. The way there is in
    `make accept SUBJECT=engine`; this is the way back."""
    first, second = APART["TP2, text 1"], LAYOUTS["TP1"]
    whole, expected = run_ranks(curve, "contrastive", first, tmp_path, 4, ranks=first.ranks)[0]
    shutil.rmtree(tmp_path / "checkpoints/step-00000004")
    losses, got = run_ranks(curve, "contrastive", second, tmp_path, 4, ranks=second.ranks)[0]
    assert losses[:2] == whole[:2]
    assert losses == pytest.approx(whole, rel=1e-5)
    assert worst_difference(got, expected) <= 1e-4


@pytest.mark.parametrize("kind", ["internvl_g", "chat_simple"])
def test_towers_in_series_have_one_layout(kind):
    layout = Layout(tensor=2, text_tensor=1)
    assert check_layout(kind, model_config(), layout) == Layout(tensor=2)
    with pytest.raises(LayoutError, match="meets the vision tower in the loss alone"):
        run_ranks(built, kind, layout, ranks=2)


def built(kind: str, layout: Layout) -> None:
    with parallel(layout):
        build(kind, model_config())


def test_towers_share_ranks_evenly():
    with pytest.raises(LayoutError, match=r"4 does not divide by layout\.text_tensor 3"):
        check_layout("internvl_c", model_config(), Layout(tensor=4, text_tensor=3))


def loss_curves_agree(
    stage: str, chosen: Layout, tmp_path: Path, steps: int, optimizer: str = "adamw"
) -> None:
    """Whole runs, optimizer and checkpoints included, on one rank and in a layout."""
    (one, expected), (got, weights) = (
        run_ranks(curve, stage, layout, tmp_path / name, steps, optimizer, ranks=layout.ranks)[0]
        for name, layout in (("one", Layout()), ("cut", chosen))
    )
    assert len(one) == steps
    assert got == pytest.approx(one, rel=1e-4)
    assert weights.keys() == expected.keys()


def test_a_packet_is_what_was_put_in():
    for dtype in (torch.float32, torch.bfloat16):
        state = {
            "vision": torch.randn(5, 2, 3, dtype=dtype, requires_grad=True),
            "scalar": torch.randn((), dtype=dtype),
            "nothing": torch.zeros(0, 4, dtype=dtype),
        }
        packet = pack(state, None, dtype)
        assert packet.shape[1:] == (1, 1)
        out = unpack(packet)
        assert list(out) == list(state)
        assert all(torch.equal(out[name], state[name]) for name in state)
        (out["vision"] * 3).sum().backward()
        assert torch.equal(state["vision"].grad, torch.full_like(state["vision"], 3))
    came = torch.zeros(4, 1, 1, requires_grad=True)
    pack({}, came, torch.float32).sum().backward()
    assert torch.equal(came.grad, torch.zeros(4, 1, 1))


def test_layers_are_cut_evenly_and_in_order():
    config = model_config()
    assert split_layers("chat_simple", config, 1) == [{"vision": range(4), "language": range(4)}]
    for kind in ("internvl_g", "chat_full"):
        shares = split_layers(kind, config, 4)
        for tower in ("vision", "text"):
            held = [index for share in shares for index in share.get(tower, ())]
            assert held == list(range(4))
    halves = range(2), range(2, 4)
    assert split_layers("internvl_c", config, 2) == [
        {"vision": half, "text": half} for half in halves
    ]


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(LayoutError, match="4 layers for 5"):
        split_layers("internvl_c", model_config(), 5)
