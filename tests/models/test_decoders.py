"""Our decoder is transformers' LLaMA and Qwen2: scaled positions, tied embeddings, all of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.support.tiny_models import count, on_meta
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.weights import load_weights, pieces
from vlfoundry.models.decoder.generate import greedy
from vlfoundry.models.decoder.hf_keys import decoder_keys
from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.decoder.official import rope_parameters
from vlfoundry.models.families import family_of, flavour, read_official, write_official
from vlfoundry.models.layers.config import DecoderConfig, RopeScaling
from vlfoundry.models.official.keymap import join_all

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR}),
    "llama-dynamic": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": DYNAMIC}),
    "llama-3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-dynamic": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": DYNAMIC}),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}


def theirs_and_ours(name: str):
    """transformers' model with random weights, biases and gains too; and ours with the same."""
    make_config, make_model, changes = CASES[name]
    changes = dict(changes)
    if "rope_parameters" in changes:
        changes["rope_parameters"] = {"rope_theta": 500.0, **changes["rope_parameters"]}
    torch.manual_seed(0)
    theirs = make_model(make_config(**(SIZES | changes))).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    config = read_official(theirs.config.to_dict())
    ours = Decoder(config).eval()
    load_weights(ours, join_all(decoder_keys(config), theirs.state_dict()))
    return theirs, ours


@pytest.mark.parametrize("length", [12, 40])  # within max_position_embeddings, and beyond
@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_transformers(name, length):
    theirs, ours = theirs_and_ours(name)
    ids = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        got = ours.logits(ours(ours.embed(ids)))
    assert wanted.abs().max() > 1
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["llama-dynamic", "qwen2-tied"])
def test_cached_decoding_gives_the_tokens_of_transformers(name):
    """Across the context's end: what is in the cache keeps the rotation that it was given."""
    theirs, ours = theirs_and_ours(name)
    ids = torch.randint(0, 61, (1, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, **options)[:, 10:]
    got = greedy(ours, ours.embed(ids), mask, max_new_tokens=20, eos_id=-1)
    assert len(set(wanted[0].tolist())) > 3
    assert torch.equal(got, wanted)


def test_a_tied_head_has_no_weights_and_learns_from_both_uses():
    config = DecoderConfig(vocab_size=61, tied_head=True)
    model = Decoder(config)
    names = {piece.name for piece in pieces(model)}
    assert "embedding.weight" in names
    assert not [name for name in names if name.startswith("head")]
    assert names == {key.ours for key in decoder_keys(config)}
    torch.nn.init.normal_(model.embedding.weight)
    model.logits(torch.ones(1, 128)).sum().backward()
    assert model.embedding.weight.grad.abs().min() > 0


def test_qwen2_half_b_has_the_published_size():
    assert count(on_meta(lambda: Decoder(flavour("qwen2-0.5b")))) == 494_032_768


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(kind="linear", factor=2.0),
        RopeScaling(kind="dynamic", factor=2.0),
        RopeScaling(kind="llama3", factor=8.0, original_max_tokens=64),
    ],
)
def test_scaling_survives_both_forms_of_a_config(scaling):
    config = DecoderConfig(rope_scaling=scaling, key_value_heads=4, init_std=0.1)
    official = write_official(config) | {"initializer_range": 0.1}
    again = read_official(official)
    assert (again.rope_scaling, again.rope_base) == (scaling, config.rope_base)
    del official["rope_scaling"], official["rope_theta"]
    again = read_official(official | {"rope_parameters": rope_parameters(config)})
    assert (again.rope_scaling, again.rope_base) == (scaling, config.rope_base)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="would shorten the context"):
        RopeScaling(kind="linear", factor=0.5)
    with pytest.raises(ValueError, match="is not below high_freq_factor"):
        RopeScaling(kind="llama3", factor=8.0, low_freq_factor=4.0)
    for options in ({"names": "internlm2", "qkv_bias": True}, {"names": "gemma"}):
        with pytest.raises(ConfigError, match="no family of language models has names="):
            family_of(DecoderConfig(**options))
    with pytest.raises(ConfigError, match=r"rope_scaling is {'type': 'su'}, expected the type"):
        read_official(write_official(DecoderConfig()) | {"rope_scaling": {"type": "su"}})
