"""Exported chat models in transformers' own class, without remote code: the same logits."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.support.tiny_models import TEXTS, pixels, tiny_config
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.internvl.convert import export_model, import_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import read_weights, save_model
from vlfoundry.models.layers.config import DecoderConfig, RopeScaling
from vlfoundry.models.tokenizer import IMG_CONTEXT_ID, train

LLAMA = DecoderConfig(
    vocab_size=320,
    width=32,
    depth=2,
    heads=4,
    key_value_heads=2,
    mlp_hidden=24,
    max_tokens=16,
    init_std=0.3,
    embedding_init_std=1.0,
)
DYNAMIC = RopeScaling(kind="dynamic", factor=2.0)
LANGUAGES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen2-dynamic": dataclasses.replace(LLAMA, qkv_bias=True, rope_scaling=DYNAMIC),
    "qwen2-tied": dataclasses.replace(LLAMA, qkv_bias=True, tied_head=True),
    "internlm2": dataclasses.replace(LLAMA, names="internlm2", rope_scaling=DYNAMIC),
}
TOWERS = {
    "6b": {},
    "300m": {"norm": "layer", "qkv_bias": True, "qk_norm": False},
}


def unsettle(model: torch.nn.Module) -> None:
    """Other biases and gains than the initial 0 and 1, which a wrong place would not show."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.add_(noise)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_logits_are_the_same(language, tower, tmp_path):
    config = tiny_config(
        language=LANGUAGES[language],
        vision=dataclasses.replace(tiny_config().vision, **TOWERS[tower]),
        connector=ConnectorConfig(kind="pixel_shuffle", ps_version="v2", select_layer=-1),
    )
    ours = build("chat_simple", config, seed=3).eval()
    unsettle(ours)
    save_model(tmp_path / "ours", "chat_simple", config, ours, train(TEXTS * 3, 320))
    export_model(tmp_path / "ours", tmp_path / "native", "transformers")

    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "native").eval()
    assert type(theirs).__name__ == "InternVLForConditionalGeneration"
    images = pixels(2)
    places = torch.full((2, config.visual_tokens("chat_simple")), IMG_CONTEXT_ID)
    words = torch.randint(20, 320, (2, 20), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:, :3], places, words[:, 3:]], 1)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=images).logits
        got = ours.language.logits(ours.chat_hidden(ids, images))
    assert wanted.abs().max() > 1
    assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()

    theirs.save_pretrained(tmp_path / "saved")
    config_of = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config_of["model_type"] == "internvl"
    import_model(tmp_path / "saved", tmp_path / "again")
    again, first = (read_weights(tmp_path / name) for name in ("again", "ours"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
