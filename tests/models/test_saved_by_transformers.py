"""Folders that transformers writes itself, and tied heads that files store all the same."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
)

from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.internvl.convert import export_model, import_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import read_config, read_weights, save_model
from vlfoundry.models.tokenizer import train

CASES = Path(__file__).parents[1] / "cases"
TIED = CASES / "tied-head-stored"
TEXT = {
    "vocab_size": 173, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 5, "num_key_value_heads": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 42, "patch_size": 7, "attention_bias": True,
}  # fmt: skip


def made(family: str, *, tied: bool) -> torch.nn.Module:
    """transformers' own model from a config that says no more than it must."""
    text = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**TEXT, tie_word_embeddings=tied)
    config = InternVLConfig(
        text_config=text, vision_config=InternVLVisionConfig(**VISION), image_token_id=160,
        image_seq_length=9, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(4)
    return AutoModelForImageTextToText.from_config(config).eval()


def live(model: torch.nn.Module, *, tied: bool) -> dict[str, torch.Tensor]:
    """Its weights by the names of the class; a tied head is the embedding."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_save_pretrained_writes_is_read(family, tied, tmp_path):
    model = made(family, tied=tied)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shutil.copytree(tmp_path / "one", tmp_path / "bin")
    saved = load_file(tmp_path / "bin" / "model.safetensors")
    assert not any(name.startswith("model.") for name in saved), "the names of the class after all"
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(saved, tmp_path / "bin" / "pytorch_model.bin")
    for store in ("one", "shards", "bin"):
        done = import_model(tmp_path / store, tmp_path / f"ours-{store}")
        assert done.unknown == ()
    first = (tmp_path / "ours-one" / "weights.safetensors").read_bytes()
    assert (tmp_path / "ours-shards" / "weights.safetensors").read_bytes() == first
    assert (tmp_path / "ours-bin" / "weights.safetensors").read_bytes() == first
    config = read_config(tmp_path / "ours-one")[1]
    assert (config.chat.tied_head, config.chat.qkv_bias) == (tied, family == "qwen2")

    export_model(tmp_path / "ours-one", tmp_path / "back", "transformers")
    again, told = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    wanted = live(model, tied=tied)
    got = live(again, tied=tied)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_both_sets_of_names_are_the_same_model(tmp_path):
    for name in ("saved", "live"):
        import_model(CASES / "hf-saved-names" / name, tmp_path / name)
    got, wanted = (tmp_path / n / "weights.safetensors" for n in ("saved", "live"))
    assert got.read_bytes() == wanted.read_bytes()


def test_a_missing_tensor_has_the_name_that_the_file_would_give_it(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(CASES / "hf-saved-names" / "saved", source)
    weights = load_file(source / "model.safetensors")
    del weights["language_model.model.norm.weight"]
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"; 1 missing: language_model\.model\.norm\.weight$"):
        import_model(source, tmp_path / "ours")


@pytest.mark.parametrize("store", ["bin", "safetensors"])
def test_the_case_of_a_tied_head_that_is_stored(store, tmp_path):
    done = import_model(TIED / store, tmp_path / "ours")
    assert done.left_out == ("language_model.lm_head.weight",)
    assert not [name for name in read_weights(tmp_path / "ours") if "head" in name]


FAMILIES = {
    # Format, changes of the language model (of the text tower of an internvl_g), the head's name.
    "llama": ("internvl_chat", {}, "language_model.lm_head.weight"),
    "qwen2": ("internvl_chat", {"qkv_bias": True}, "language_model.lm_head.weight"),
    "internlm2": ("internvl_chat", {"names": "internlm2"}, "language_model.output.weight"),
    "native": ("transformers", {"qkv_bias": True}, "lm_head.weight"),
    "qllama": ("internvl_14b", {}, "qllama.lm_head.weight"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_of_every_family(family, tmp_path):
    format, changes, head = FAMILIES[family]
    kind = "internvl_g" if family == "qllama" else "chat_simple"
    text = dataclasses.replace(
        tiny_config().text, vocab_size=330, tied_head=True, embedding_init_std=0.3, **changes
    )
    config = tiny_config(text=text)
    model = build(kind, config, seed=3)
    save_model(tmp_path / "ours", kind, config, model, train(TEXTS * 3, 320))
    source = tmp_path / "source"
    export_model(tmp_path / "ours", source, format)
    weights = load_file(source / "model.safetensors")
    assert head not in weights
    table = next(n for n in weights if n.endswith(("embed_tokens.weight", "tok_embeddings.weight")))

    def store(changed: dict) -> None:
        save_file({n: t.clone() for n, t in changed.items()}, source / "model.safetensors")

    store(weights | {head: weights[table]})
    assert import_model(source, tmp_path / "equal").left_out == (head,)
    wanted, got = (read_weights(tmp_path / name) for name in ("ours", "equal"))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)

    # Some trainers store the head in place of the embedding.
    store({n: t for n, t in weights.items() if n != table} | {head: weights[table]})
    assert import_model(source, tmp_path / "head").left_out == ()
    assert all(torch.equal(t, wanted[n]) for n, t in read_weights(tmp_path / "head").items())

    other = weights[table].clone()
    other[7, 3] += 1e-3
    store(weights | {head: other})
    with pytest.raises(ModelError, match=rf"'{head}' of .* is not equal to .*{table}.*tie_word"):
        import_model(source, tmp_path / "unequal")
    store(weights | {head: weights[table][1:]})
    with pytest.raises(ModelError, match=rf"1 of another shape: {head}"):
        import_model(source, tmp_path / "unequal")
    assert not (tmp_path / "unequal").exists()
    facts = json.loads((source / "config.json").read_text())
    assert "tie_word_embeddings" in json.dumps(facts)
