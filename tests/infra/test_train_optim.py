"""Learning rates, layer-wise decay, StableAdamW and the running mean against plain formulas."""

import numpy as np
import pytest

from tests.support import tiny_tower as tower
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.optim import lr_at

pytestmark = pytest.mark.slow

LAYOUTS = [Layout(), Layout(data=2), Layout(tensor=2)]


def _rates(**options):
    config = TrainConfig(**({"steps": 10, "batch_samples": 8, "lr": 1.0} | options))
    return [lr_at(step, config) for step in range(11)]


def test_learning_rate_schedule():
    cosine = _rates(warmup_steps=4, min_lr_ratio=0.1)
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine[7] == pytest.approx(0.55)
    assert cosine[10] == pytest.approx(0.1)
    assert _rates(schedule="constant") == [1.0] * 11
    assert _rates(schedule="linear", min_lr_ratio=0.5) == pytest.approx(np.linspace(1, 0.5, 11))
    assert _rates(schedule="polynomial", power=2.0)[5] == pytest.approx(0.25)
    assert _rates(warmup_ratio=0.4) == _rates(warmup_steps=4)
    with pytest.raises(ConfigError, match=r"warmup_steps is 4 and train\.warmup_ratio 0\.4"):
        _rates(warmup_steps=4, warmup_ratio=0.4)


def test_layer_decay_of_one_tower(run_ranks):
    """Spec 5.3 with L = 2: embeddings 0.9^3, blocks 0.9^2 and 0.9, the rest 1."""

    def factors():
        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.optim import lr_factors

        config = TrainConfig(
            steps=1, batch_samples=8, lr=1.0, layer_decay={"": 0.9},
            lr_scale={"decoder.layers.1.mlp": 0.5},
        )  # fmt: skip
        with parallel(Layout()):
            return lr_factors([tower.build()], config)

    found = run_ranks(factors, ranks=1)[0]
    assert found["class_embedding"] == pytest.approx(0.9**3)
    assert found["decoder.layers.0.mlp.linear_fc1.weight"] == pytest.approx(0.9**2)
    assert found["decoder.layers.1.self_attention.linear_qkv.weight"] == pytest.approx(0.9)
    assert found["decoder.layers.1.mlp.linear_fc1.weight"] == pytest.approx(0.45)


def test_layer_decay_of_two_towers(run_ranks):
    def factors():
        from tests.support.tiny_project import PARAMS
        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.core.config import build
        from vlfoundry.infra.train.optim import lr_factors
        from vlfoundry.models.internvl.config import InternVLConfig
        from vlfoundry.models.internvl.model import build as build_model

        config = TrainConfig(
            steps=1, batch_samples=8, lr=1.0, layer_decay={"vision": 0.9, "text": 0.8}
        )
        with parallel(Layout()):
            model = build_model("internvl_g", build(InternVLConfig, PARAMS["model"]), seed=0)
            return lr_factors([model], config)

    found = run_ranks(factors, ranks=1)[0]
    assert found["text.query_tokens"] == found["logit_scale"] == pytest.approx(0.8**3)
    assert found["vision.decoder.layers.1.mlp.linear_fc1.weight"] == pytest.approx(0.9)
    crossing = {v for k, v in found.items() if "layers.0.cross_attention" in k}
    assert crossing == {0.8**2}
    heads = {v for k, v in found.items() if k.startswith(("clip_projector", "itm_head"))}
    assert heads == {1.0}


@pytest.fixture(scope="module")
def plain(run_ranks):
    """StableAdamW (Wortsman et al. 2023, algorithm 2) tensor by tensor on one rank, and the mean.

    Returns initial and final canonical weights, and how many tensors' steps were shortened.
    """

    def compute():
        import torch

        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.weights import gather_weights

        with parallel(Layout()):
            model = tower.build()
            before = {name: w.numpy() for name, w in gather_weights(model).items()}
            params = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
            means = [p.detach().clone() for p in model.parameters()]
            shortened = 0
            for step in range(1, CONFIG.steps + 1):
                loss, _ = tower.objective(model, _jumping_batch_at(step - 1))
                model.zero_grad()
                loss.backward()
                with torch.no_grad():
                    for (p, v, u), mean in zip(params, means, strict=True):
                        b1, b2 = CONFIG.beta1, CONFIG.beta2
                        b1 *= (1 - b1 ** (step - 1)) / (1 - b1**step)
                        b2 *= (1 - b2 ** (step - 1)) / (1 - b2**step)
                        v.copy_(b1 * v + (1 - b1) * p.grad)
                        u.copy_(b2 * u + (1 - b2) * p.grad**2)
                        floor = torch.full_like(u, CONFIG.eps**2)
                        rms = (p.grad**2 / torch.maximum(u, floor)).mean().sqrt()
                        shortened += int(rms > 1)
                        rate = lr_at(step - 1, CONFIG) / max(1.0, float(rms))
                        decay = CONFIG.weight_decay if p.dim() > 1 else 0.0
                        p.copy_(p - rate * decay * p - rate * v / (u.sqrt() + CONFIG.eps))
                        mean.mul_(CONFIG.ema_decay).add_(p, alpha=1 - CONFIG.ema_decay)
            for p, mean in zip(model.parameters(), means, strict=True):
                p.data.copy_(mean)
            after = {name: w.numpy() for name, w in gather_weights(model).items()}
            return before, after, shortened

    return run_ranks(compute, ranks=1)[0]


CONFIG = TrainConfig(
    steps=5, batch_samples=tower.BATCH, lr=1e-2, warmup_steps=2, eps=1e-6, clip_grad=0.0,
    beta2=0.99, optimizer="stable_adamw", ema_decay=0.6, save_every_steps=2,
)  # fmt: skip


def _jumping_batch_at(step):
    """From the third batch on the targets are far off: the second moment lags behind."""
    pixels, targets = tower.batch_at(step)
    return pixels, targets * (20.0 if step >= 2 else 1.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one rank", "data 2", "tensor 2"])
def test_stable_adamw_and_the_mean_agree_with_plain_ones(run_ranks, tmp_path, plain, layout):
    before, expected, shortened = plain
    assert shortened > 5, "nothing to clip: the test would say nothing"
    poison = {(rank, batch): 20.0 for rank in range(2) for batch in range(2, 9)}

    def run(stop=None):
        return tower.train(tmp_path, CONFIG, layout=layout, poison=poison, drop_path=0.0, stop=stop)

    run_ranks(lambda: run(stop=(0, 2)), ranks=layout.ranks)
    result, weights, _, _ = run_ranks(run, ranks=layout.ranks)[0]
    assert result.resumed_from == 3
    for name, want in expected.items():
        # Adam makes much of the rounding of gradients near 0, so not element by element.
        moved = np.linalg.norm(want - before[name])
        assert np.linalg.norm(weights[name] - want) < 1e-3 * moved, name


def test_the_mean_goes_on_in_another_layout(run_ranks, tmp_path):
    config = TrainConfig(
        steps=4, batch_samples=tower.BATCH, lr=1e-2, ema_decay=0.9, save_every_steps=2
    )

    def run(work, layout, stop=None):
        return tower.train(work, config, layout=layout, stop=stop, drop_path=0.0)

    run_ranks(run, tmp_path / "split", Layout(tensor=2), (0, 1), ranks=2)
    split = run_ranks(run, tmp_path / "split", Layout(data=2), ranks=2)[0]
    whole = run_ranks(run, tmp_path / "whole", Layout(), ranks=1)[0]
    assert split[0].resumed_from == 2
    for name, want in whole[1].items():
        np.testing.assert_allclose(split[1][name], want, rtol=1e-2, atol=1e-4, err_msg=name)
