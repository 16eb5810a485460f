"""Tables of names: both ways, and what does not fit is named."""

import dataclasses

import pytest
import torch

from tests.support.tiny_models import tiny_config
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.train.weights import pieces
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.internvit.config import internvit
from vlfoundry.models.internvit.hf import keys as vision_keys
from vlfoundry.models.internvl.config import internvl
from vlfoundry.models.internvl.hf import keys, llava_keys, native_keys
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.official.keymap import Key, check_names, join_all, one, split_all

KINDS = ("vision", "internvl_c", "internvl_g", "chat_simple")


def both_norms():
    """The 6B's kind of vision tower with the text's grouped queries, and the 300M's with Qwen2."""
    qwen = DecoderConfig(
        vocab_size=61, width=16, depth=2, heads=4, key_value_heads=2, mlp_hidden=12, qkv_bias=True
    )
    layer = internvit(
        "300m", width=20, depth=2, heads=5, mlp_hidden=24, patch_px=4, image_px=16
    )  # fmt: skip
    return tiny_config(), tiny_config(vision=layer, text=qwen)


@pytest.mark.parametrize("config", both_norms())
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_the_model(kind, config):
    model = build(kind, config)
    assert {piece.name: piece.shape for piece in pieces(model)} == {
        key.ours: key.shape for key in keys(config, kind)
    }


@pytest.mark.parametrize("config", both_norms())
@pytest.mark.parametrize("table", [*KINDS, "native"])
def test_there_and_back_is_the_same(table, config):
    found = list(native_keys(config) if table == "native" else keys(config, table))
    generator = torch.Generator().manual_seed(0)
    theirs = {
        n: torch.randn(shape, generator=generator) for key in found for n, shape in key.theirs
    }
    ours = join_all(found, theirs)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        key.ours: key.shape for key in found
    }
    back = split_all(found, ours)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name


def test_groups_of_blocks():
    key = Key(ours="w", shape=(6,), theirs=(("t", (6,)),), groups=2, blocks=3)
    joined = key.join([torch.tensor([1, 2, 10, 20, 100, 200])])
    assert joined.tolist() == [1, 10, 100, 2, 20, 200]
    assert key.split(joined)[0].tolist() == [1, 2, 10, 20, 100, 200]


@pytest.mark.parametrize(("flavour", "tensors"), [("6b", 628), ("6b-448-v1.2", 589), ("300m", 340)])
def test_a_released_vision_tower_has_as_many_tensors(flavour, tensors):
    names = [name for key in vision_keys(internvit(flavour)) for name in key.names]
    assert len(set(names)) == len(names) == tensors


def test_the_paper_model_has_the_published_size():
    table = list(keys(internvl("paper"), "internvl_g"))
    assert sum(torch.Size(s).numel() for key in table for _, s in key.theirs) == 13_834_975_747


def test_what_no_format_holds_is_refused():
    with pytest.raises(ModelError, match="no official table of names is for a chat_full"):
        keys(tiny_config(), "chat_full")
    plain = tiny_config(connector=ConnectorConfig(kind="mlp2x"))
    for table in (keys(plain, "chat_simple"), native_keys(plain)):
        with pytest.raises(ModelError, match="connector is of kind 'mlp2x'"):
            list(table)
    with pytest.raises(ModelError, match="LLaVA's form has 'mlp2x' alone"):
        llava_keys(tiny_config(), "chat_simple")
    biased = dataclasses.replace(plain.text, qkv_bias=True)
    with pytest.raises(ModelError, match="of the family qwen2; LLaVA's form has a LLaMA"):
        llava_keys(tiny_config(connector=plain.connector, text=biased), "chat_full")


def test_every_fault_is_named():
    found = {"kept": (2,), "extra": (1,), "bent": (3, 2)}
    wanted = {"kept": (2,), "lost": (1,), "bent": (2, 3)}
    with pytest.raises(ModelError) as error:
        check_names("here", found, wanted)
    for part in ("1 missing: lost", "1 surplus: extra", r"bent [3, 2] (expected [2, 3])"):
        assert part in str(error.value)


def test_a_missing_tensor_is_named():
    with pytest.raises(ModelError, match="lack b"):
        join_all([one("a", (), "b")], {})
