"""InternLM2 in InternVL-Chat checkpoints.

No numbers of the official class are recorded. That ours is equal is shown by an identity: an
InternLM2 written out plainly below, from the specification (section 10.5 for the rows of wqkv) and
in float64, gives the logits of what is imported; and so do the same weights in LLaMA's names.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.families import read_official, write_official
from vlfoundry.models.internvl.convert import export_model, import_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import read_config, read_weights

GOLDEN = Path(__file__).parents[1] / "eval" / "golden" / "internvl_chat"
WIDTH, HEADS, GROUPS, HIDDEN, DEPTH, VOCAB = 40, 4, 2, 96, 2, 140
HEAD = WIDTH // HEADS
LLM = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 16,
    "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH,
    "num_key_value_heads": GROUPS,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
LAYER = {
    "attention.wqkv": ((HEADS + 2 * GROUPS) * HEAD, WIDTH),
    "attention.wo": (WIDTH, WIDTH),
    "feed_forward.w1": (HIDDEN, WIDTH),
    "feed_forward.w2": (WIDTH, HIDDEN),
    "feed_forward.w3": (HIDDEN, WIDTH),
    "attention_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
}


def language_weights() -> dict[str, torch.Tensor]:
    shapes = {
        "model.tok_embeddings.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "output.weight": (VOCAB, WIDTH),
    }
    for index in range(DEPTH):
        shapes |= {f"model.layers.{index}.{n}.weight": shape for n, shape in LAYER.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) == 2 else 1.0)
        for name, shape in shapes.items()
    }


def internvl_chat(folder: Path, dtype=torch.float32) -> Path:
    """The recorded InternVL-Chat with an InternLM2 in the place of its LLaMA."""
    folder.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    config |= {"llm_config": LLM, "ps_version": "v2"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name: tensor
        for name, tensor in load_file(GOLDEN / "weights.safetensors").items()
        if not name.startswith("language_model.")
    }
    weights |= {f"language_model.{name}": t for name, t in language_weights().items()}
    save_file({n: t.to(dtype) for n, t in weights.items()}, folder / "model.safetensors")
    return folder


def plain_internlm2(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one text [T], in float64, as the specification describes InternLM2."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + LLM["rms_norm_eps"]).sqrt() * gain

    def rotate(x):  # [T, heads, HEAD]: channel i turns with channel i + HEAD / 2
        context, factor = LLM["max_position_embeddings"], LLM["rope_scaling"]["factor"]
        base = LLM["rope_theta"]
        if len(x) > context:
            base *= (factor * len(x) / context - (factor - 1)) ** (HEAD / (HEAD - 2))
        out = torch.empty_like(x)
        half = HEAD // 2
        for place in range(len(x)):
            for i in range(half):
                angle = place / base ** (2 * i / HEAD)
                a, b = x[place, :, i], x[place, :, i + half]
                out[place, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[place, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["model.tok_embeddings"][ids]
    tokens, queries = len(ids), HEADS // GROUPS
    for index in range(DEPTH):
        layer = f"model.layers.{index}."
        rows = norm(x, w[f"{layer}attention_norm"]) @ w[f"{layer}attention.wqkv"].T
        rows = rows.view(tokens, GROUPS, queries + 2, HEAD)
        q = rotate(rows[:, :, :queries].reshape(tokens, HEADS, HEAD))
        k, v = rotate(rows[:, :, queries]), rows[:, :, queries + 1]
        found = []
        for head in range(HEADS):
            scores = q[:, head] @ k[:, head // queries].T / math.sqrt(HEAD)
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
            found.append(scores.softmax(-1) @ v[:, head // queries])
        x = x + torch.cat(found, -1) @ w[f"{layer}attention.wo"].T
        h = norm(x, w[f"{layer}ffn_norm"])
        gate = torch.nn.functional.silu(h @ w[f"{layer}feed_forward.w1"].T)
        x = x + (gate * (h @ w[f"{layer}feed_forward.w3"].T)) @ w[f"{layer}feed_forward.w2"].T
    return norm(x, w["model.norm"]) @ w["output"].T


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    kind, config = read_config(folder)
    model = build(kind, config).eval()
    load_weights(model, read_weights(folder))
    with torch.no_grad():
        return model.language.logits(model.language(model.language.embed(ids[None])))[0]


def some_ids(length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [9, 40])  # within the context of 16, and scaled beyond it
def test_the_logits_are_those_of_a_plain_internlm2_and_of_its_llama_form(length, tmp_path):
    import_model(internvl_chat(tmp_path / "source"), tmp_path / "ours")
    ids = some_ids(length)
    wanted = plain_internlm2(language_weights(), ids)
    got = logits(tmp_path / "ours", ids)
    assert wanted.abs().max() > 1
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()

    folder = export_llama_form(tmp_path)
    import_model(folder, tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again", ids), got)


def export_llama_form(tmp_path: Path) -> Path:
    """The same weights by LLaMA's names, which `transformers` format has."""
    done = export_model(tmp_path / "ours", tmp_path / "native", "transformers")
    assert done.kind == "chat_simple"
    text = json.loads((tmp_path / "native" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert text["rope_parameters"] == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    native = load_file(tmp_path / "native" / "model.safetensors")
    for index in range(DEPTH):
        wqkv = language_weights()[f"model.layers.{index}.attention.wqkv.weight"]
        grouped = wqkv.view(GROUPS, HEADS // GROUPS + 2, HEAD, WIDTH)
        parts = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
        for part, rows in parts.items():
            name = f"model.language_model.layers.{index}.self_attn.{part}_proj.weight"
            assert torch.equal(native[name], rows.reshape(-1, WIDTH)), name
    return tmp_path / "native"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_is_bit_identical(dtype, tmp_path):
    source = internvl_chat(tmp_path / "source", dtype)
    done = import_model(source, tmp_path / "ours")
    assert (done.format, done.kind, done.left_out) == ("internvl_chat", "chat_simple", ())
    export_model(tmp_path / "ours", tmp_path / "back", "internvl_chat")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    weights, back = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", "1 missing: language_model.model.layers.1.feed_forward.w3.weight"),
        ("add", "1 surplus: language_model.model.layers.0.attention.wqkv.bias"),
    ],
)
def test_every_key_is_accounted_for(change, message, tmp_path):
    source = internvl_chat(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    if change == "drop":
        del weights["language_model.model.layers.1.feed_forward.w3.weight"]
    else:
        weights["language_model.model.layers.0.attention.wqkv.bias"] = torch.ones(1)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        import_model(source, tmp_path / "ours")


def test_the_class_says_what_a_language_model_is():
    """As in the official chat models, which choose by `architectures`."""
    assert read_official(LLM | {"model_type": "llama"}).names == "internlm2"
    config = read_official(LLM)
    assert read_official(write_official(config)) == config
    assert write_official(config)["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    with pytest.raises(ConfigError, match=r"is \['Phi3ForCausalLM'\], exp.*: internlm2 .*llama \("):
        read_official(LLM | {"architectures": ["Phi3ForCausalLM"]})
    with pytest.raises(ConfigError, match="bias is True, expected False: biases there are not"):
        read_official(LLM | {"bias": True})
