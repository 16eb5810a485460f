"""Every flavour builds, and what is built does what it should."""

import pytest
import torch

from tests.support.tiny_models import chat_batch, count, on_meta, pixels, texts, tiny_config
from vlfoundry.infra.core.errors import ConfigError, LayoutError, ModelError
from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.families import flavour, flavours
from vlfoundry.models.internvit.config import FLAVOURS as VIT_FLAVOURS
from vlfoundry.models.internvit.config import InternViTConfig, internvit
from vlfoundry.models.internvit.model import InternViT
from vlfoundry.models.internvl.config import FLAVOURS as INTERNVL_FLAVOURS
from vlfoundry.models.internvl.config import PARTS, internvl
from vlfoundry.models.internvl.freeze import freeze
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.canonical import initialise

pytestmark = pytest.mark.slow


def vision_tower(config: InternViTConfig) -> InternViT:
    model = InternViT(config)
    initialise(model, 0)
    return model


@pytest.mark.parametrize("name", VIT_FLAVOURS)
def test_vision_flavours_build(name):
    assert count(on_meta(lambda: InternViT(internvit(name)))) > 0


@pytest.mark.parametrize("name", flavours())
def test_language_models_build(name):
    assert count(on_meta(lambda: Decoder(flavour(name)))) > 0


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", INTERNVL_FLAVOURS)
def test_internvl_flavours_build(name, kind):
    assert count(on_meta(lambda: build(kind, internvl(name)))) > 0


@pytest.mark.parametrize("kind", PARTS)
def test_every_kind_runs(kind):
    config = tiny_config()
    model = build(kind, config).eval()
    ids, mask = texts(3)
    with torch.no_grad():
        if kind == "text":
            assert model.text.logits(model.text.encode(ids, mask)).shape == (3, 7, 61)
        if kind == "vision":
            assert model.vision(pixels(3)).shape == (3, 17, 20)
        if kind.startswith("internvl"):
            for unit in (model.embed_images(pixels(3)), model.embed_texts(ids, mask)):
                assert unit.shape == (3, 8)
                assert torch.allclose(unit.norm(dim=-1), torch.ones(3))
        if kind.startswith("chat"):
            batch = chat_batch(config, kind, 3)
            hidden = model.chat_hidden(batch["ids"], batch["pixels"])
            assert hidden.shape == (*batch["ids"].shape, 16)


def test_flip_masking_is_the_same_as_leaving_patches_out():
    model = vision_tower(tiny_config().vision).eval()
    images = pixels(2)
    kept = torch.tensor([[0, 2, 3, 5, 8, 9, 14, 15], [1, 2, 4, 6, 7, 10, 11, 12]])
    everything = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        assert model(images, kept).shape == (2, 9, 20)
        assert torch.allclose(model(images, everything), model(images), atol=1e-6)


def test_other_image_sizes_interpolate_positions():
    model = vision_tower(tiny_config().vision).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 24, 8)).shape == (1, 1 + 6 * 2, 20)
    with pytest.raises(ModelError, match="multiples of 4 px"):
        model(torch.randn(1, 3, 18, 16))


def test_drop_path_drops_whole_samples_and_only_in_training():
    config = InternViTConfig(width=8, depth=1, heads=2, mlp_hidden=8, image_px=8, drop_path=0.9999)
    model = vision_tower(config)
    image = pixels(4, side=8)
    start = model(image, hidden_state=0)
    torch.manual_seed(0)
    assert torch.equal(model.train()(image), start)
    assert not torch.allclose(model.eval()(image), start)
    assert internvit("300m").drop_paths[0] == 0.0
    assert internvit("300m").drop_paths[-1] == 0.1


def test_generation_with_cache_is_generation_without():
    config = tiny_config()
    model = build("chat_full", config, seed=5).eval()
    batch = chat_batch(config, "chat_full", 2)
    ids, images = batch["ids"], batch["pixels"]
    new = model.generate(ids, torch.ones_like(ids), images, max_new_tokens=4, eos_id=-1)
    for _ in range(4):
        with torch.no_grad():
            hidden = model.chat_hidden(ids, images)
            best = model.language.logits(hidden[:, -1]).argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    assert torch.equal(new, ids[:, -4:])


def test_left_padding_does_not_change_what_is_generated():
    model = build("internvl_g", tiny_config(), seed=2).eval()
    prompt, image = torch.tensor([[1, 20, 30]]), pixels(1)
    one = torch.ones_like(prompt)
    alone = model.generate(prompt, one, image, max_new_tokens=5, eos_id=-1)
    padded, mask = (torch.nn.functional.pad(x, (2, 0)) for x in (prompt, one))
    assert torch.equal(alone, model.generate(padded, mask, image, max_new_tokens=5, eos_id=-1))


def test_a_row_that_ended_stays_ended():
    model = build("internvl_g", tiny_config(), seed=2).eval()
    prompt = torch.tensor([[1, 20, 30]])
    free = model.generate(prompt, torch.ones_like(prompt), pixels(1), max_new_tokens=6, eos_id=-1)
    end = int(free[0, 1])
    cut = model.generate(prompt, torch.ones_like(prompt), pixels(1), max_new_tokens=6, eos_id=end)
    assert cut.shape[1] <= 2
    assert int(cut[0, -1]) == end


def test_wrong_number_of_image_places_is_refused():
    config = tiny_config()
    model = build("chat_simple", config)
    batch = chat_batch(config, "chat_simple", 2)
    with pytest.raises(ModelError, match="image places"):
        model.chat_hidden(batch["ids"], batch["pixels"][:1])


def test_initial_weights_depend_on_the_seed_only():
    first, again, other = (build("internvl_c", tiny_config(), seed=s) for s in (1, 1, 2))
    weights = [dict(m.named_parameters()) for m in (first, again, other)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    name = "vision.patch_embedding.weight"
    assert not torch.equal(weights[0][name], weights[2][name])


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="known: "):
        internvit("7b")
    with pytest.raises(ConfigError, match="internvl_c"):
        build("internvl_h", tiny_config())
    with pytest.raises(LayoutError, match="needs Transformer Engine"):
        build("internvl_c", tiny_config(), spec="te")
    with pytest.raises(ValueError, match="does not divide by heads"):
        InternViTConfig(width=10, heads=3)


def test_stage_2_trains_queries_cross_attention_and_new_heads_only():
    model = build("internvl_g", tiny_config())
    trained = freeze(model, "stage2")
    parts = {
        n if n.count(".") < 2 else ".".join(p for p in n.split(".") if not p.isdigit())
        for n in trained
    }
    assert "text.query_tokens" in parts
    assert "logit_scale" in parts
    assert all(
        n.startswith(("text.query_tokens", "clip_projector2.", "itm_head.", "logit_scale"))
        or ".cross_attention." in n
        for n in trained
    )
    # Layer 0 looks at the image, layer 1 does not (frequency 2).
    assert any("layers.0.cross_attention" in n for n in trained)
    assert not any("layers.1.cross_attention" in n for n, _ in model.named_parameters())
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(model, ["language"])


def test_freezing_by_parts():
    model = build("chat_full", tiny_config())
    assert {n.split(".")[0] for n in freeze(model, "sft")} == {
        "connector",
        "query_connector",
        "language",
    }
    assert {n.split(".")[0] for n in freeze(model, ["connector"])} >= {"connector"}
    assert {n.split(".")[0] for n in freeze(model, ["vision", "language"])} == {
        "vision",
        "language",
    }
