"""Tokens after a prompt: the plain path against the modules, and against no cache at all."""

import pytest
import torch

from tests.support.tiny_models import tiny_config
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.models.decoder import decode
from vlfoundry.models.decoder.beam import beam_search
from vlfoundry.models.decoder.generate import causal_blocked, greedy
from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.attention import key_value_cache
from vlfoundry.models.layers.canonical import initialise
from vlfoundry.models.layers.config import DecoderConfig, LoraConfig, RopeScaling
from vlfoundry.models.qllama.config import QLlamaConfig
from vlfoundry.models.qllama.model import QLlama

NEW = 6
SHAPES = {
    "one key a head": {},
    "grouped": {"key_value_heads": 2},
    "one key for all": {"key_value_heads": 1, "rope_base": 500.0},
    "biases": {"key_value_heads": 2, "qkv_bias": True},
    "head tied": {"tied_head": True},
    "norms of heads": {"key_value_heads": 2, "qk_norm": True, "head_dim": 10},
}
STRETCHED = {
    kind: {"max_tokens": 6, "rope_scaling": RopeScaling(kind=kind, factor=4.0)}
    for kind in ("linear", "dynamic", "llama3")
}


def make(shape: str = "grouped", lora: LoraConfig | None = None, **options) -> Decoder:
    fields = (SHAPES | STRETCHED)[shape]
    config = DecoderConfig(
        vocab_size=97, width=32, depth=3, heads=4, mlp_hidden=24, init_std=0.4, lora=lora, **fields
    )
    model = (QLlama if options else Decoder)(config, **options).eval()
    initialise(model, 5)
    draw = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=draw)
    return model


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [3, 5], left-padded."""
    ids = torch.randint(97, (3, 5), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


def with_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "plain_layers", lambda _decoder: None)


@torch.no_grad()
def continued(model, ids, mask, tokens) -> torch.Tensor:
    """Hidden states [B, N, D] of `tokens` [B, N] fed one by one after the prompt."""
    blocked = causal_blocked(ids.shape[1]) | ~mask.bool()[:, None, None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with key_value_cache(model, ids.shape[1] + tokens.shape[1]):
        model(model.embed(ids), blocked, positions=positions)
        feed = decode.Continuation(model, mask, tokens.shape[1])
        return torch.stack([feed(column) for column in tokens.T], 1)


@torch.no_grad()
def without_cache(model, ids, mask, tokens) -> torch.Tensor:
    whole, real = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    blocked = causal_blocked(whole.shape[1]) | ~real.bool()[:, None, None]
    positions = (real.cumsum(1) - 1).clamp_min(0)
    return model(model.embed(whole), blocked, positions=positions)[:, ids.shape[1] :]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_at_a_time_is_the_whole_text_at_once(shape, padded, monkeypatch):
    model = make(shape)
    ids, mask = prompt()
    mask = mask if padded else torch.ones_like(mask)
    tokens = torch.randint(97, (3, NEW), generator=torch.Generator().manual_seed(2))
    plain = continued(model, ids, mask, tokens)
    with_modules(monkeypatch)

    assert torch.allclose(plain, without_cache(model, ids, mask, tokens), rtol=0, atol=2e-5)
    assert torch.allclose(plain, continued(model, ids, mask, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", STRETCHED)
def test_stretched_positions_are_the_modules(shape, monkeypatch):
    model = make(shape)
    tokens = torch.randint(97, (3, NEW), generator=torch.Generator().manual_seed(2))
    plain = continued(model, *prompt(), tokens)
    with_modules(monkeypatch)

    assert torch.allclose(plain, continued(model, *prompt(), tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_and_beams_choose_what_the_modules_choose(shape, monkeypatch):
    model = make(shape)
    ids, mask = prompt()
    blocked = causal_blocked(5) | ~mask.bool()[:, None, None]
    options = {"prefix_mask": blocked, "max_new_tokens": NEW, "eos_id": 3}

    def both():
        embeddings = model.embed(ids)
        return (
            greedy(model, embeddings, mask, **options).tolist(),
            beam_search(model, embeddings, mask, beams=3, **options),
        )

    plain = both()
    with_modules(monkeypatch)

    assert plain == both()


def test_captions_of_queries_are_the_modules(monkeypatch):
    model = make(queries=QLlamaConfig(num_queries=3, init_std=0.4), vision_width=20)
    vision = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(3))
    ids, mask = prompt()
    options = {"max_new_tokens": NEW, "eos_id": -1}
    assert is_plain(model)

    plain = model.generate(vision, ids, mask, **options)
    other = model.generate(vision.flip(0), ids, mask, **options)
    with_modules(monkeypatch)

    assert torch.equal(plain, model.generate(vision, ids, mask, **options))
    assert not torch.equal(plain, other)


def is_plain(model) -> bool:
    with key_value_cache(model, 1):
        return decode.plain_layers(model) is not None


def test_the_weights_are_the_modules_own():
    model = make("biases")
    with key_value_cache(model, 1):
        layers = decode.plain_layers(model)
    assert layers is not None
    names = ("attention_norm", "qkv", "qkv_bias", "projection", "mlp_norm", "gate_up", "down")
    used = {getattr(layer, name).data_ptr() for layer in layers for name in names}

    assert used == {parameter.data_ptr() for parameter in model.decoder.layers.parameters()}


def another_linear(model) -> None:
    projection = model.decoder.layers[2].self_attention.linear_proj
    projection.__class__ = type("Scaled", (type(projection),), {})


def hook(model) -> None:
    model.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [another_linear, hook])
def test_what_is_not_known_runs_through_the_modules(change):
    model = make()
    assert is_plain(model)
    change(model)
    assert not is_plain(model)


@pytest.mark.parametrize("linear", ["qkv", "proj", "fc1", "fc2"])
def test_adapters_run_through_the_modules(linear):
    assert not is_plain(make(lora=LoraConfig(rank=2, linears=(linear,))))


def replies(tensor: int) -> list:
    with parallel(Layout(tensor=tensor)):
        model = build("chat_simple", tiny_config(), seed=3).eval()
        ids = torch.arange(12, 22).view(2, 5)
        plain = is_plain(model.language)
        new = model.generate(
            ids, torch.ones_like(ids), None, max_new_tokens=NEW, eos_id=-1, context_id=5
        )
        return [plain, new.tolist()]


def test_two_tensor_ranks_reply_as_one(run_ranks):
    one = run_ranks(replies, 1, ranks=1)[0]
    two = run_ranks(replies, 2, ranks=2)[0]

    assert (one[0], two[0]) == (True, False)
    assert one[1] == two[1]
