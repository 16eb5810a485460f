"""Canonical weights: whole tensors, stable bytes, any layout, and clear refusals."""

import numpy as np
import pytest

from tests.support import tiny_tower as tower
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.core.errors import ModelError

pytestmark = pytest.mark.slow


def _write(layout, path):
    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.infra.train.weights import gather_weights, write_safetensors

    with parallel(layout):
        whole = gather_weights(tower.build())
        if whole is not None:
            write_safetensors(path, whole, {"kind": "tower", "format": "test"})


def test_same_bytes_in_every_layout(run_ranks, tmp_path):
    for name, layout in {
        "one": Layout(), "tensor": Layout(tensor=2), "data": Layout(data=2)
    }.items():  # fmt: skip
        run_ranks(_write, layout, tmp_path / name, ranks=layout.ranks)
    one = (tmp_path / "one").read_bytes()
    assert (tmp_path / "tensor").read_bytes() == one
    assert (tmp_path / "data").read_bytes() == one


def test_file_is_safetensors_with_one_name_a_layer(run_ranks, tmp_path):
    from safetensors import safe_open

    run_ranks(_write, Layout(), tmp_path / "w", ranks=1)
    with safe_open(tmp_path / "w", framework="np") as file:
        assert file.metadata() == {"kind": "tower", "format": "test"}
        names = list(file.keys())
        assert "decoder.layers.1.self_attention.linear_qkv.weight" in names
        # 5 heads of 8: no trace of padding.
        qkv = file.get_tensor("decoder.layers.1.self_attention.linear_qkv.weight")
    assert qkv.shape == (120, 40)


def test_loads_in_another_layout(run_ranks, tmp_path):
    """Written on two tensor ranks with padded heads, read on one, and the other way round."""

    def read_and_write(layout, source, target):
        import torch

        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.weights import gather_weights, load_weights, write_safetensors

        with parallel(layout):
            model = tower.build()
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, 7.0)
            load_weights(model, source)
            qkv = model.decoder.layers[0].self_attention.linear_qkv.weight
            whole = gather_weights(model)
            if whole is not None:
                write_safetensors(target, whole, {"kind": "tower", "format": "test"})
            return qkv.detach().numpy()[-1]

    first, second, third = (tmp_path / name for name in "abc")
    run_ranks(_write, Layout(tensor=2), first, ranks=2)
    run_ranks(read_and_write, Layout(), first, second, ranks=1)
    rows = run_ranks(read_and_write, Layout(tensor=2), second, third, ranks=2)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert not np.any(rows[1]), "the padding head must be zero, not what was there before"
    assert np.any(rows[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"weight 'tower.ls' is missing|weight 'tower.class_embedding' is missing"),
        ("surplus", r"1 weights in .* belong to no parameter.* 'tower.zzz'"),
        ("misshaped", r"'tower.class_embedding' .* has shape \[3\]; the model's config asks for"),
    ],
)
def test_wrong_weights_are_named(run_ranks, change, message):
    def load():
        import torch

        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.weights import gather_weights, load_weights

        with parallel(Layout()):
            model = tower.build()
            weights = {f"tower.{n}": w for n, w in gather_weights(model).items()}
            weights["other.weight"] = torch.zeros(1)  # outside the prefix: no business of ours
            if change == "missing":
                del weights["tower.class_embedding"]
            elif change == "surplus":
                weights["tower.zzz"] = torch.zeros(1)
                load_weights(model, weights, prefix="tower.", strict=False)
            else:
                weights["tower.class_embedding"] = torch.zeros(3)
            load_weights(model, weights, prefix="tower.")

    with pytest.raises(ModelError, match=message):
        run_ranks(load, ranks=1)


def test_missing_file_is_named(run_ranks, tmp_path):
    def load():
        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.weights import load_weights

        with parallel(Layout()):
            load_weights(tower.build(), tmp_path / "nothing.safetensors")

    with pytest.raises(ModelError, match="do not exist"):
        run_ranks(load, ranks=1)
