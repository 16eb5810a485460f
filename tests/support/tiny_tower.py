"""A small InternViT for tests of the backend and of training: 5 heads, which pad under TP."""

import hashlib
import os
import signal

import numpy as np

BATCH = 8


def build(*, drop_path: float = 0.0):
    """The tower with weights that depend on their names only."""
    import torch

    from vlfoundry.infra.train.weights import load_weights, pieces
    from vlfoundry.models.internvit.config import InternViTConfig
    from vlfoundry.models.internvit.model import InternViT

    config = InternViTConfig(
        width=40, depth=2, heads=5, mlp_hidden=80, patch_px=8, image_px=16, drop_path=drop_path
    )
    model = InternViT(config)
    weights = {}
    for piece in pieces(model):
        seed = int.from_bytes(hashlib.sha256(piece.name.encode()).digest()[:6], "big")
        noise = torch.randn(piece.shape, generator=torch.Generator().manual_seed(seed))
        is_gain = "norm" in piece.name or piece.name.endswith(("ls1", "ls2"))
        weights[piece.name] = 1 + 0.2 * noise if is_gain else 0.2 * noise
    load_weights(model, weights)
    return model


def batch_at(step: int, *, rank: int = 0, ranks: int = 1):
    """This rank's slice of the global batch of a step: (pixels, targets)."""
    import torch

    generator = torch.Generator().manual_seed(1000 + step)
    pixels = torch.randn(BATCH, 3, 16, 16, generator=generator)
    targets = torch.randn(BATCH, 40, generator=generator)
    part = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return pixels[part], targets[part]


def objective(model, batch):
    """Mean square distance of the class token to a target."""
    pixels, targets = batch
    out = model(pixels)[:, 0].float()
    return (out - targets).square().mean(), {"size": out.detach().abs().mean()}


def data_batch_at(step: int):
    """`batch_at` for this process's data-parallel rank."""
    from megatron.core import parallel_state

    return batch_at(
        step,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
    )


def gradients(*, sum_qk_norms_by_name: bool = False) -> dict | None:
    """Canonical gradients of the tower on batch 0 in the current layout (rank 0), as numpy.

    `sum_qk_norms_by_name` turns Megatron's `qk_layernorm` on, which is the trap.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from vlfoundry.infra.backend import device_literals
    from vlfoundry.infra.train.weights import gather_weights

    model = build()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    model.config.qk_layernorm = sum_qk_norms_by_name
    with device_literals():
        loss, _ = objective(model, data_batch_at(0))
        loss.backward()
        finalize_model_grads([wrapped])
    for parameter in model.parameters():
        parameter.data.copy_(parameter.main_grad)
    whole = gather_weights(model)
    return None if whole is None else {name: grad.numpy() for name, grad in whole.items()}


def train(
    work,
    config,
    *,
    layout=None,
    run_key="key",
    kill=None,
    stop=None,
    stop_signal=signal.SIGTERM,
    poison=None,
    poison_in_fp8=None,
    frozen="",
    drop_path=0.3,
    **options,
):
    """On each rank: fit the tower.

    Args:
        work: folder.
        config: TrainConfig.
        layout: Layout; None: two data-parallel ranks.
        run_key: of the run.
        kill: (rank, batch) of a SIGKILL.
        stop: (rank, batch) of `stop_signal`.
        poison: {(rank, batch): factor} on the batch's targets.
        poison_in_fp8: the same, for as long as the tower computes in FP8.
        frozen: prefix of parameters that are not trained.
        drop_path: of the tower.
        **options: of `fit`.

    Returns:
        Result, canonical weights (rank 0), lines of the log, numbers of the batches.
    """
    from vlfoundry.infra.backend import Layout
    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.infra.backend.world import this_rank
    from vlfoundry.infra.train.loop import fit
    from vlfoundry.infra.train.weights import gather_weights

    layout = layout or Layout(data=2)
    lines, batches = [], []

    def numbered_batch_at(number):
        here = (this_rank().index, number)
        batches.append(number)
        if here == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if here == stop:
            os.kill(os.getpid(), stop_signal)
        pixels, targets = data_batch_at(number)
        in_fp8 = any(getattr(module, "fp8_product", None) for module in model.modules())
        factors = {**(poison or {}), **(poison_in_fp8 or {} if in_fp8 else {})}
        return pixels, targets * factors.get(here, 1.0)

    with parallel(layout, seed=config.seed, fp8=config.fp8):
        model = build(drop_path=drop_path)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
        result = fit(
            model, objective, numbered_batch_at, config,
            work=work, run_key=run_key, layout=layout, log=lines.append, **options,
        )  # fmt: skip
        whole = gather_weights(model)
        weights = None if whole is None else {name: w.numpy() for name, w in whole.items()}
    return result, weights, lines, batches


def assert_same(got, expected):
    """Two results of `train` on rank 0 agree in every bit of history and weights."""
    assert got[0].history == expected[0].history
    assert got[0].bad_steps == expected[0].bad_steps
    for name, want in expected[1].items():
        assert np.array_equal(got[1][name], want), name
