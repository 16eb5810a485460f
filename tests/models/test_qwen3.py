"""Qwen3 is transformers' Qwen3ForCausalLM: logits, decoding, loss, gradients, files, layouts."""

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.models import test_layouts as layouts
from tests.support.tiny_models import count, on_meta, tiny_config
from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.decoder.generate import greedy
from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.families import families, flavour, read_official, write_official
from vlfoundry.models.internvl.convert import export_model, import_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import read_config, read_weights, save_model
from vlfoundry.models.official.keymap import join_all, split_all
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.slow

NAMES = ("apart", "tied", "stretched", "one key for all")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 38,
    "max_position_embeddings": 15,
    "initializer_range": 0.3,
}
CHANGES = {
    "apart": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "stretched": {
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0},
        "tie_word_embeddings": False,
    },
    "one key for all": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}
KEYS = families()["qwen3"].keys


def theirs_and_ours(name: str):
    """transformers' model with random weights, gains too; and ours with the same."""
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(**(SIZES | CHANGES[name]))).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    config = read_official(theirs.config.to_dict())
    ours = Decoder(config).eval()
    load_weights(ours, join_all(KEYS(config), theirs.state_dict()))
    return theirs, ours


def ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [11, 37])  # within max_position_embeddings, and beyond
@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_transformers(name, length):
    theirs, ours = theirs_and_ours(name)
    with torch.no_grad():
        wanted = theirs(input_ids=ids(length)).logits
        got = ours.logits(ours(ours.embed(ids(length))))
    assert wanted.abs().max() > 1
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_gives_the_tokens_of_transformers(name):
    theirs, ours = theirs_and_ours(name)
    prompt = ids(9, rows=1)
    mask = torch.ones_like(prompt)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(prompt, attention_mask=mask, max_new_tokens=21, **options)[:, 9:]
    got = greedy(ours, ours.embed(prompt), mask, max_new_tokens=21, eos_id=-1)
    assert len(set(wanted[0].tolist())) > 3
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_transformers(name):
    theirs, ours = theirs_and_ours(name)
    theirs.train()
    ours.train()
    given = ids(13)
    wanted = theirs(input_ids=given, labels=given).loss
    wanted.backward()
    logits = ours.logits(ours(ours.embed(given)))[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    expected = join_all(KEYS(ours.decoder_config), gradients)
    found = {n: p.grad for n, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for tensor_name, gradient in found.items():
        difference = (gradient - expected[tensor_name]).norm() / expected[tensor_name].norm()
        assert difference < 1e-5, tensor_name


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_there_and_back(name):
    theirs, ours = theirs_and_ours(name)
    again = split_all(KEYS(ours.decoder_config), ours.state_dict())
    left = {n: t for n, t in theirs.state_dict().items() if n in again}
    assert {n for n in theirs.state_dict() if n not in again} <= {"lm_head.weight"}
    assert all(torch.equal(again[n], t) for n, t in left.items())
    assert Qwen3Config(**write_official(ours.decoder_config)).head_dim == 10


@pytest.mark.parametrize("format", ["internvl_chat", "transformers"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_chat_model_goes_through_each_format(format, tied, tmp_path):
    language = read_official(Qwen3Config(**SIZES, tie_word_embeddings=tied).to_dict())
    config = tiny_config(language=language)
    config = dataclasses.replace(
        config,
        connector=dataclasses.replace(config.connector, kind="pixel_shuffle", shuffle_side=2),
    )
    model = build("chat_simple", config, seed=1).eval()
    save_model(tmp_path / "ours", "chat_simple", config, model, train(["some text"], 300))
    export_model(tmp_path / "ours", tmp_path / "official", format)
    said = json.loads((tmp_path / "official" / "config.json").read_text())
    part = said["llm_config" if format == "internvl_chat" else "text_config"]
    assert (part["model_type"], part["head_dim"]) == ("qwen3", 10)
    import_model(tmp_path / "official", tmp_path / "again")
    assert read_config(tmp_path / "again")[1].chat.qk_norm
    before, after = read_weights(tmp_path / "ours"), read_weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_what_its_class_writes_is_what_ours_reads(tmp_path):
    """The file that `save_pretrained` writes, and a config that leaves its defaults out."""
    theirs, ours = theirs_and_ours("apart")
    theirs.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert read_official(facts) == ours.decoder_config
    del facts["head_dim"]
    assert read_official(facts).head_size == 128
    weights = load_file(tmp_path / "model.safetensors")
    again = join_all(KEYS(ours.decoder_config), weights)
    assert all(torch.equal(again[n], t) for n, t in ours.named_parameters())


CELLS = [
    (stage, layout, tied)
    for stage, layout, tied in itertools.product(["text", "simple"], layouts.LAYOUTS, [False, True])
    if not (tied and layouts.LAYOUTS[layout].pipeline > 1)  # refused, whatever the family
]


@pytest.mark.parametrize(("stage", "layout", "tied"), CELLS[::3])
def test_gradients_are_those_of_one_rank(stage, layout, tied, monkeypatch):
    """The other cells are in `make accept SUBJECT=engine`."""
    gradients_are_those_of_one_rank(stage, layout, tied, monkeypatch)


def gradients_are_those_of_one_rank(stage, layout, tied, monkeypatch):
    base = layouts.model_config()
    shape = {"qk_norm": True, "head_dim": 6, "tied_head": tied}
    text = dataclasses.replace(base.text, **shape)
    config = dataclasses.replace(base, text=text, language=text)
    monkeypatch.setattr(layouts, "model_config", lambda: config)
    monkeypatch.setattr(layouts, "_alone", _alone[tied])
    layouts.gradients_are_those_of_one_rank(stage, layouts.LAYOUTS[layout])


_alone: dict[bool, dict] = {False: {}, True: {}}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976), ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360), ("qwen3-14b", 14_768_307_200), ("qwen3-32b", 32_762_123_264),
    ],
)  # fmt: skip
def test_published_sizes(name, parameters):
    assert count(on_meta(lambda: Decoder(flavour(name)))) == parameters
