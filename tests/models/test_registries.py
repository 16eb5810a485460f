"""To register is to be tested: every flavour runs with its own flags in small, and round-trips."""

import dataclasses

import pytest
import torch

from tests.support.tiny_models import TEXTS, chat_batch, pixels, texts, tiny_config
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.families import (
    families,
    family_of,
    flavour,
    flavours,
    read_official,
    write_official,
)
from vlfoundry.models.internvit.config import FLAVOURS as VISION
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.internvl.config import FLAVOURS as CHATS
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.convert import FORMATS, PYTORCH_FILES, export_model, import_model
from vlfoundry.models.internvl.model import InternVL, build
from vlfoundry.models.internvl.predict import read_config, read_weights, save_model
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.slow


def small_vision(config: InternViTConfig) -> InternViTConfig:
    """Another size, the same options; the heads stay odd or even, patches as many as before."""
    heads = 5 if config.heads % 2 else 4
    return dataclasses.replace(
        config, width=4 * heads, depth=4, heads=heads, mlp_hidden=24, patch_px=4, image_px=16
    )


def small_language(config: DecoderConfig) -> DecoderConfig:
    """Another size, the same options; grouped queries stay grouped."""
    groups = None if config.key_value_heads in (None, config.heads) else 2
    sizes = {"vocab_size": 61, "width": 16, "depth": 2, "heads": 4, "mlp_hidden": 12}
    return dataclasses.replace(config, **sizes, max_tokens=24, key_value_heads=groups)


def small(config: InternVLConfig) -> InternVLConfig:
    return dataclasses.replace(
        config,
        vision=small_vision(config.vision),
        text=small_language(config.text),
        language=None if config.language is None else small_language(config.language),
        queries=dataclasses.replace(config.queries, num_queries=3),
        embed_dim=8,
        pool_heads=2,
    )


def run(model: InternVL, kind: str) -> torch.Tensor:
    """What the configuration is for: embeddings, logits or hidden states."""
    config = model.model_config
    ids, mask = texts(2)
    if kind == "vision":
        return model.vision(pixels(2))
    if kind == "text":
        return model.text.logits(model.text.encode(ids, mask))
    if kind.startswith("internvl"):
        return model.embed_images(pixels(2)) @ model.embed_texts(ids, mask).T
    batch = chat_batch(config, kind, 2)
    return model.language.logits(model.chat_hidden(batch["ids"], batch["pixels"]))


def formats(kind: str, config: InternVLConfig) -> set[str]:
    """By the specification: which formats hold a model."""
    if kind == "vision":
        return {"internvit", "internvit_pth"}
    if kind == "internvl_c":
        return {"internvl_c_pth"}
    if kind == "internvl_g":
        return {"internvl_14b"}
    plain = config.connector.kind == "mlp2x"
    if kind == "chat_full":
        return {"llava_full"} if plain else set()
    if kind == "chat_simple" and plain:
        return {"llava"}
    if kind == "chat_simple":
        return {"internvl_chat"} | (
            {"transformers"} if config.connector.ps_version == "v2" else set()
        )
    return set()


def check(kind: str, config: InternVLConfig, folder) -> None:
    """Runs, and goes through each format that holds it; the others say why they do not."""
    model = build(kind, config, seed=1).eval()
    with torch.no_grad():
        out = run(model, kind)
    assert bool(out.isfinite().all())
    assert out.std() > 0
    ours = folder / "ours"
    save_model(ours, kind, config, model, train(TEXTS, 300))
    weights = read_weights(ours)
    for format in FORMATS:
        target, again = folder / format, folder / f"{format}-again"
        if format not in formats(kind, config):
            with pytest.raises(ModelError, match=r"cannot be written as|connector|pixel shuffle"):
                export_model(ours, target, format)
            assert not target.exists()
            continue
        export_model(ours, target, format)
        import_model(target / "model.pth" if format in PYTORCH_FILES else target, again)
        back = read_weights(again)
        assert back.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(back[name], tensor), (format, name)
        kind_again, config_again = read_config(again)
        assert kind_again == kind
        model = build(kind, config_again).eval()
        load_weights(model, back)
        with torch.no_grad():
            assert torch.equal(run(model, kind), out), format


@pytest.mark.parametrize("name", VISION)
def test_vision_flavours(name, tmp_path):
    check("vision", tiny_config(vision=small_vision(VISION[name])), tmp_path)


@pytest.mark.parametrize("name", families())
def test_a_family_holds_what_it_promises(name):
    family = families()[name]
    assert family.name == name
    assert family.flavours
    for config in family.flavours.values():
        assert [f.name for f in families().values() if f.fits(config)] == [name]
        assert family_of(config) is family
        official = write_official(config)
        assert not set(official) - {*family.table.fields, *family.table.harmless}
        filled = {"init_std": config.matrix_std, "embedding_init_std": config.matrix_std}
        groups = config.key_value_heads or config.heads
        wanted = dataclasses.replace(config, key_value_heads=groups, **filled)
        assert read_official(official) == read_official(official, name=name) == wanted
        names = [n for key in family.keys(config) for n in key.names]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", flavours())
def test_language_flavours(name, tmp_path):
    check("chat_simple", tiny_config(language=small_language(flavour(name))), tmp_path)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", CHATS)
def test_internvl_flavours(name, kind, tmp_path):
    check(kind, small(CHATS[name]()), tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_holds_some_flavour(format):
    held = {f for name in CHATS for kind in PARTS for f in formats(kind, CHATS[name]())}
    assert format in held
