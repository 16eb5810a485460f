"""Exports that other programs can use as they are: tokenizer, processor, chat template, ids."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.official_text import ROWS, write_template, write_tokenizer
from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.models.chat.official import official_tokenizer
from vlfoundry.models.chat.templates import IMG_CONTEXT, TEMPLATES, Message
from vlfoundry.models.internvl.convert import export_model, import_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import load_model, load_tokenizer, read_config, save_model
from vlfoundry.models.internvl.prompts import SUMMARIZE
from vlfoundry.models.preprocess.geometry import PictureConfig
from vlfoundry.models.preprocess.normalize import MEAN, STD
from vlfoundry.models.tokenizer import train

QUESTION = "una mela rossa, nicht wahr?"
FILES = {
    "transformers": {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "preprocessor_config.json", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    },
    "internvl_chat": {
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    },
}  # fmt: skip


def config_of(rows: int = 331):
    base = tiny_config()
    vision = dataclasses.replace(base.vision, patch_px=5, image_px=30)
    text = dataclasses.replace(base.text, vocab_size=rows, max_tokens=222)
    return dataclasses.replace(base, vision=vision, text=text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A chat model of ours, with sizes of which no two agree, and its exports."""
    root = tmp_path_factory.mktemp("handover")
    config = config_of()
    model = build("chat_simple", config, seed=3)
    save_model(root / "ours", "chat_simple", config, model, train(TEXTS * 3, 317))
    for format in FILES:
        export_model(root / "ours", root / format, format)
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(image: Image.Image, text: str) -> list[dict]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_an_export_has_all_that_its_reader_asks_for(folders):
    for format, files in FILES.items():
        assert {path.name for path in (folders / format).iterdir()} == files


def test_the_processor_gives_what_our_own_model_is_given(folders):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folders / "transformers")
    assert type(processor).__name__ == "InternVLProcessor"
    model, image = load_model(folders / "ours"), picture(30, 30)
    given = processor.apply_chat_template(
        asked(image, QUESTION), add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    tokens = model.config.visual_tokens("chat_simple")
    assert tokens == 9
    assert given["input_ids"].tolist() == [model.dialogue.question(QUESTION, tokens)]
    wanted = model._pixels(model.sight.squares(np.asarray(image), "chat"))
    assert torch.allclose(given["pixel_values"], wanted, atol=1e-6)


@pytest.mark.parametrize("size", [(171, 44), (60, 90), (31, 200), (75, 75)])
def test_a_picture_of_any_shape_is_cut_as_ours_is(size, folders):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folders / "transformers")
    model, image = load_model(folders / "ours"), picture(*size)
    squares = model.sight.squares(np.asarray(image), "chat")
    given = processor.apply_chat_template(
        asked(image, QUESTION), tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert given["input_ids"].tolist() == [model.dialogue.question(QUESTION, 9 * len(squares))]
    wanted = model._pixels(squares)
    assert given["pixel_values"].shape == wanted.shape
    # torchvision's bicubic and Pillow's differ by a level here and there.
    assert (given["pixel_values"] - wanted).abs().max() < 2.1 / 255 / min(STD)


def test_pictures_of_another_kind_are_told(tmp_path):
    config = dataclasses.replace(config_of(), pictures=PictureConfig(geometry="squeeze"))
    model = build("chat_simple", config, seed=3)
    tokenizer = train(TEXTS * 3, 317)
    save_model(tmp_path / "ours", "chat_simple", config, model, tokenizer)
    assert export_model(tmp_path / "ours", tmp_path / "out", "transformers").note == ""
    told = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (told["crop_to_patches"], told["max_patches"]) == (False, 1)
    import_model(tmp_path / "out", tmp_path / "again")
    assert read_config(tmp_path / "again")[1].pictures.geometry == "squeeze"

    config = dataclasses.replace(config, pictures=PictureConfig(geometry="pad"))
    save_model(tmp_path / "pad", "chat_simple", config, model, tokenizer)
    done = export_model(tmp_path / "pad", tmp_path / "padded", "transformers")
    assert "squeezes pictures into a square; this model is given them by pad" in done.note


def test_the_number_of_tiles_comes_back(folders, tmp_path):
    wanted = PictureConfig(min_tiles=2, max_tiles=7)
    config = dataclasses.replace(config_of(), pictures=wanted)
    model = build("chat_simple", config, seed=3)
    save_model(tmp_path / "ours", "chat_simple", config, model, train(TEXTS * 3, 317))
    export_model(tmp_path / "ours", tmp_path / "out", "transformers")
    import_model(tmp_path / "out", tmp_path / "again")
    assert read_config(tmp_path / "again")[1].pictures == wanted
    facts = json.loads((tmp_path / "again" / "config.json").read_text())
    facts["model"]["pictures"]["max_tiles"] = 3
    (tmp_path / "again" / "config.json").write_text(json.dumps(facts))
    export_model(tmp_path / "again", tmp_path / "third", "transformers")
    told = json.loads((tmp_path / "third" / "preprocessor_config.json").read_text())
    assert (told["min_patches"], told["max_patches"]) == (2, 3)


def test_the_pipeline_says_what_our_own_model_says(folders):
    from transformers import pipeline

    asks = pipeline("image-text-to-text", model=str(folders / "transformers"))
    ours = load_model(folders / "ours")
    answers = set()
    for seed in range(3):
        image = picture(30, 30, seed)
        said = asks(text=asked(image, QUESTION), max_new_tokens=13, return_full_text=False)
        (wanted,) = ours.generate(np.asarray(image)[None], [QUESTION], 13)
        assert said[0]["generated_text"].strip() == plain(ours, wanted)
        answers.add(wanted)
    assert len(answers) > 1, "the picture changes nothing: a wrong place would not show"


def plain(model, text: str) -> str:
    """Without special tokens, which the pipeline leaves out."""
    for token in ("<pad>", "<img>", "</img>", IMG_CONTEXT, "<quad>", "</quad>", "<ref>", "</ref>",
                  "<box>", "</box>"):  # fmt: skip
        text = text.replace(token, "")
    return text.strip()


def test_greedy_ids_are_the_same(folders):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folders / "transformers")
    theirs = AutoModelForImageTextToText.from_pretrained(folders / "transformers").eval()
    assert theirs.generation_config.eos_token_id == 2
    assert theirs.generation_config.pad_token_id == 0
    model, image = load_model(folders / "ours"), picture(30, 30, 5)
    given = processor.apply_chat_template(
        asked(image, QUESTION), tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = theirs.generate(**given, max_new_tokens=17)[:, given["input_ids"].shape[1] :]
    with torch.inference_mode():
        wanted = model.module.generate(
            given["input_ids"], torch.ones_like(given["input_ids"]), given["pixel_values"],
            max_new_tokens=17, eos_id=model.stop_id, context_id=model.dialogue.context_id,
        )  # fmt: skip
    assert new.tolist() == wanted.tolist()


TALKS = (
    [("human", "<image>\nWhat is it?"), ("gpt", " A cat. "), ("human", "And <image> there?")],
    [("system", "Be brief."), ("human", "<image><image>Which?"), ("gpt", "The second.")],
    [("human", "Just words"), ("gpt", "Yes"), ("human", "ok?"), ("gpt", "Ok.")],
)


def as_parts(talk) -> list[dict]:
    """A conversation in transformers' form; a picture's line is its own."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = []
    for role, text in talk:
        parts = []
        for number, piece in enumerate(text.split("<image>")):
            if number:
                parts.append({"type": "image"})
            if piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": roles[role], "content": parts})
    return messages


@pytest.mark.parametrize("talk", TALKS, ids=("pictures", "system", "words"))
def test_conversations_are_written_as_they_were_learnt(talk, folders):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folders / "transformers")
    text = processor.apply_chat_template(as_parts(talk), tokenize=False)
    text = text.replace(IMG_CONTEXT, f"<img>{IMG_CONTEXT * 9}</img>")
    count = sum(text.count("<image>") for _, text in talk)
    tokenizer = load_tokenizer(folders / "ours")
    ids, _ = tokenizer.dialogue.conversation([Message(*turn) for turn in talk], [9] * count)
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_an_export_comes_in_again_with_its_own_dialogue(folders, tmp_path):
    wanted = load_tokenizer(folders / "ours").dialogue.question(QUESTION, 9)
    for format in FILES:
        import_model(folders / format, tmp_path / format)
        assert load_tokenizer(tmp_path / format).dialogue.question(QUESTION, 9) == wanted
        export_model(tmp_path / format, tmp_path / f"{format}-again", format)
        for path in (folders / format).iterdir():
            assert (tmp_path / f"{format}-again" / path.name).read_bytes() == path.read_bytes()


def test_texts_of_an_embedding_model_begin_and_end(tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer

    config = config_of()
    model = build("internvl_g", config, seed=3)
    save_model(tmp_path / "ours", "internvl_g", config, model, train(TEXTS * 3, 317))
    export_model(tmp_path / "ours", tmp_path / "out", "internvl_14b")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids, _ = load_tokenizer(tmp_path / "ours").encode_batch(
        [TEXTS[1]], prefix=SUMMARIZE, max_tokens=80
    )
    assert tokenizer(SUMMARIZE + TEXTS[1])["input_ids"] == ids[0].tolist()
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(picture(61, 33), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 30, 30)
    assert np.allclose(processor.image_mean, MEAN)
    assert np.allclose(processor.image_std, STD)


def test_a_tower_has_what_its_pictures_need(tmp_path):
    config = config_of()
    save_model(
        tmp_path / "ours", "vision", config, build("vision", config), train(TEXTS * 3, 317)
    )  # fmt: skip
    export_model(tmp_path / "ours", tmp_path / "out", "internvit")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["internvl2_5", "Hermes-2"])
def test_an_official_chat_model_becomes_transformers_own(name, tmp_path):
    """With its tokenizer, and its template in Jinja."""
    from transformers import AutoProcessor

    config = config_of(ROWS)
    model = build("chat_simple", config, seed=3)
    save_model(tmp_path / "made", "chat_simple", config, model, train(TEXTS * 3, 317))
    export_model(tmp_path / "made", tmp_path / "published", "internvl_chat")
    for path in (tmp_path / "published").glob("*token*"):
        path.unlink()
    (tmp_path / "published" / "generation_config.json").write_text('{"do_sample": false}')
    write_tokenizer(tmp_path / "published", "qwen_like")
    write_template(tmp_path / "published", name)
    facts = json.loads((tmp_path / "published" / "config.json").read_text())
    facts |= {"dynamic_image_size": True, "max_dynamic_patch": 5, "use_thumbnail": True}
    (tmp_path / "published" / "config.json").write_text(json.dumps(facts))
    import_model(tmp_path / "published", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "out", "transformers")

    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.max_patches == 5
    spoken = official_tokenizer(tmp_path / "ours" / "official", embeds=False).dialogue
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told["eos_token_id"] == spoken.stop_id
    assert told["do_sample"] is False
    given = processor.apply_chat_template(
        asked(picture(30, 30), QUESTION), add_generation_prompt=True, tokenize=True,
        return_dict=True,
    )  # fmt: skip
    assert list(given["input_ids"][0]) == spoken.question(QUESTION, 9)
    assert TEMPLATES[name].system in processor.tokenizer.decode(given["input_ids"][0])
    talk = [("human", "What?"), ("gpt", "That."), ("human", "Oh")]
    text = processor.apply_chat_template(as_parts(talk), add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    (done, _) = spoken.conversation([Message(*turn) for turn in talk[:2]], [])
    assert ids[: len(done)] == done
