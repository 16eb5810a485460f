"""Tokenizer, pictures, prompts, and model folders."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.chat.control import GROUNDING
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import load_model, load_parts, read_config, save_model
from vlfoundry.models.internvl.prompts import IGNORE, caption_prompt, caption_rows, labelled_rows
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.preprocess.normalize import MEAN, STD, normalize_uint8, over_background
from vlfoundry.models.tokenizer import (
    BOS_ID,
    EOS_ID,
    IMG_CONTEXT_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    Tokenizer,
    train,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 3, 320)


def config_for(tokenizer: Tokenizer) -> InternVLConfig:
    text = DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=16, depth=2, heads=2, mlp_hidden=12, max_tokens=40
    )
    return tiny_config(text=text)


@pytest.mark.parametrize("text", [*TEXTS, "never seen: Ω 漢字 🙂\n"])
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_a_tokenizer_is_repeatable(tokenizer, tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    tokenizer.save(paths[0])
    train(TEXTS * 3, 320).save(paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert Tokenizer.load(paths[0]).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_special_tokens_are_single_ids(tokenizer):
    """Of texts that people write only those of grounding are taken (test_control_tokens)."""
    assert [tokenizer._backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(
        range(len(SPECIAL_TOKENS))
    )
    assert [tokenizer.encode(token) for token in GROUNDING] == [
        [SPECIAL_TOKENS.index(token)] for token in GROUNDING
    ]
    text = "<ref>a</ref><box>[[1, 2, 3, 4]]</box>"
    assert tokenizer.decode([*tokenizer.encode(text), EOS_ID], keep_special=True) == text


def test_rows_are_padded_on_the_right_and_keep_their_end(tokenizer):
    ids, mask = tokenizer.encode_batch(["a", TEXTS[0]], prefix="summarize:", max_tokens=12)
    assert ids.shape[1] <= 12
    assert (ids[:, 0] == BOS_ID).all()
    last = mask.sum(1) - 1
    assert (ids[np.arange(2), last] == EOS_ID).all()
    assert ((ids == PAD_ID) == (mask == 0)).all()
    open_ended, _ = tokenizer.encode_batch(["a"], max_tokens=12, add_eos=False)
    assert EOS_ID not in open_ended


def test_wrong_tokenizers_are_refused(tmp_path):
    with pytest.raises(ModelError, match="at least 268"):
        train(TEXTS, 100)
    with pytest.raises(ModelError, match="does not exist"):
        Tokenizer.load(tmp_path / "none.json")


def test_only_answers_are_labelled(tokenizer):
    asked = [("What colour?", "red"), ("Where?", "on the table")]
    ids, mask, labels = labelled_rows(
        [tokenizer.dialogue.exchange(*pair, visual_tokens=4) for pair in asked], PAD_ID
    )
    assert (ids == IMG_CONTEXT_ID).sum(1).tolist() == [4, 4]
    for row in range(2):
        learnt = labels[row] != IGNORE
        assert labels[row][learnt][-1] == EOS_ID
        text = tokenizer.decode(labels[row][learnt])
        assert text == [" red", " on the table"][row]
        assert ids[row][learnt].tolist() == labels[row][learnt].tolist()
    assert (labels[mask == 0] == IGNORE).all()
    prompt = tokenizer.dialogue.question("Where?", 4)
    assert ids[1][: len(prompt)].tolist() == prompt


def test_caption_prompts_are_not_learnt(tokenizer):
    ids, _, labels = caption_rows(tokenizer, ["una mela"], ["it"], max_tokens=60)
    learnt = labels[0] != IGNORE
    assert tokenizer.decode(ids[0][~learnt]) == caption_prompt("it") == "Italian caption:"
    assert tokenizer.decode(labels[0][learnt]) == "una mela"


def test_pixels_are_normalised():
    image = np.full((1, 2, 2, 3), 255, np.uint8)
    expected = (1 - np.array(MEAN)) / np.array(STD)
    assert np.allclose(normalize_uint8(image)[0, :, 0, 0].numpy(), expected, atol=1e-5)


def test_transparency_shows_the_background():
    image = np.zeros((1, 3, 4), np.uint8)
    image[0, :, 0] = 200
    image[0, :, 3] = [0, 255, 128]
    flat = over_background(image, (10, 20, 30))
    assert flat[0, 0].tolist() == [10, 20, 30]
    assert flat[0, 1].tolist() == [200, 0, 0]
    assert flat[0, 2].tolist() == [105, 10, 15]


@pytest.mark.parametrize("kind", PARTS)
def test_a_saved_model_is_the_same_model(kind, tokenizer, tmp_path):
    config = config_for(tokenizer)
    model = build(kind, config, seed=4)
    for name in ("a", "b"):
        save_model(tmp_path / name, kind, config, model, tokenizer)
    for file in ("config.json", "weights.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert read_config(tmp_path / "a") == (kind, config)

    loaded = load_model(tmp_path / "a")
    original = dict(model.named_parameters())
    for name, parameter in loaded.module.named_parameters():
        assert torch.equal(parameter, original[name]), name
    check_use(loaded)
    other = dict(load_model(tmp_path / "a", untrained_seed=9).module.named_parameters())
    matrix = next(n for n, p in original.items() if p.dim() == 2)
    assert not torch.equal(other[matrix], original[matrix])


def check_use(model) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 30, 20, 3), dtype=np.uint8)
    if "embed" in model.capabilities:
        for rows in (model.embed_images(images), model.embed_texts(TEXTS[:3])):
            assert rows.shape == (3, 8)
            assert rows.dtype == np.float32
            assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        assert model.embed_texts([]).shape == (0, 8)
        # Padding to the longest text of a batch must not move the others.
        alone = model.embed_texts(TEXTS[:1])
        assert np.allclose(alone, model.embed_texts(TEXTS)[:1], atol=1e-5)
    else:
        with pytest.raises(ModelError, match="cannot embed"):
            model.embed_texts(["a"])
    if "match" in model.capabilities:
        sure = model.match(images, TEXTS[:3])
        assert sure.dtype == np.float32
        assert ((sure > 0) & (sure < 1)).all()
        assert np.allclose(sure[1:2], model.match(images[1:2], TEXTS[1:2]), atol=1e-5)
        assert not np.allclose(sure, model.match(images[::-1], TEXTS[:3]), atol=1e-5)
        assert model.match([], []).shape == (0,)
        # A picture that comes again is looked at once, and answers as if it came alone.
        first, second = images[0], images[1]
        with patch.object(model.module, "run", wraps=model.module.run) as run:
            again = model.match([first, second, first], TEXTS[:3])
        assert [len(call.args[1]["pixels"]) for call in run.call_args_list] == [2]
        assert np.allclose(again, model.match(images[[0, 1, 0]], TEXTS[:3]), atol=1e-5)
    else:
        with pytest.raises(ModelError, match="cannot match"):
            model.match(images, TEXTS[:3])
    if "generate" in model.capabilities:
        answers = model.generate(images, ["What?", "Where is it?", "Who?"], 4)
        assert len(answers) == 3
        assert answers[1] == model.generate(images[1:2], ["Where is it?"], 4)[0]
    if model.module.vision is not None:
        assert model.image_features(images).shape == (3, 20)


def test_parts_come_from_other_models(tokenizer, tmp_path):
    config = config_for(tokenizer)
    for kind in ("text", "internvl_c"):
        save_model(tmp_path / kind, kind, config, build(kind, config, seed=1), tokenizer)
    chat = build("chat_simple", config, seed=2)
    assert load_parts(chat, tmp_path / "text", {"language": "text"}) == []
    assert load_parts(chat, tmp_path / "internvl_c", {"vision": "vision"}) == []
    source = build("text", config, seed=1)
    assert torch.equal(chat.language.head.weight, source.text.head.weight)

    stage2 = build("internvl_g", config, seed=2)
    parts = ("vision", "text", "clip_projector", "text_projection", "logit_scale")
    missing = load_parts(stage2, tmp_path / "internvl_c", {part: part for part in parts})
    assert "text.head.weight" in missing
    assert "text.query_tokens" in missing
    assert all("cross_attention" in n or n in missing[-9:] for n in missing)
    assert load_parts(stage2, tmp_path / "text", {"text.head": "text.head"}) == []
    with pytest.raises(ModelError, match="has no 'language'"):
        load_parts(chat, tmp_path / "text", {"language": "language"})


def test_broken_folders_are_refused(tokenizer, tmp_path):
    config = config_for(tokenizer)
    with pytest.raises(ModelError, match="is not a model folder"):
        load_model(tmp_path)
    save_model(tmp_path, "text", config, build("text", config), tokenizer)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["model"]["text"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="missing"):
        load_model(tmp_path)
    facts["format"] = "other"
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="format 'other'"):
        load_model(tmp_path)
