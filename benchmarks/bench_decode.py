"""Greedy decoding with a key/value cache, against transformers' `generate` with the same weights.

One thread, batch 1 and 8, a prompt of 64 tokens and 64 new ones. `tokens_that_differ` must be 0.
The limit is what no loop over these weights can pass: each token's matrix products, nothing else.
"""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Case, LeftOut, benchmark

if TYPE_CHECKING:
    from torch import Tensor

    from vlfoundry.models.decoder.model import Decoder
    from vlfoundry.models.layers.config import DecoderConfig

SEED = 64
PROMPT_TOKENS, NEW_TOKENS = 64, 64
# width, layers, heads, key/value heads, hidden size of the MLP
SIZES = ((256, 4, 4, 4, 704), (384, 6, 6, 6, 1024))
VOCAB = 8192
BATCHES = (1, 8)
PACKAGES = ("torch", "megatron-core")


@benchmark("decode")
def decode() -> Iterator[LeftOut | tuple[Case, ...]]:
    """New tokens a CPU-second."""
    import torch

    from vlfoundry.models.layers.config import DecoderConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for width, depth, heads, groups, hidden in SIZES:
        config = DecoderConfig(
            vocab_size=VOCAB, width=width, depth=depth, heads=heads, key_value_heads=groups,
            mlp_hidden=hidden, max_tokens=PROMPT_TOKENS + NEW_TOKENS,
        )  # fmt: skip
        for batch in BATCHES:
            yield from _cases(config, batch)
    torch.set_num_threads(threads)


def _cases(config: "DecoderConfig", batch: int) -> Iterator[LeftOut | tuple[Case, ...]]:
    import torch

    from vlfoundry.models.decoder.generate import greedy
    from vlfoundry.models.decoder.model import Decoder
    from vlfoundry.models.layers.canonical import initialise

    model = Decoder(config).eval()
    initialise(model, SEED)
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(VOCAB, (batch, PROMPT_TOKENS), generator=draw)
    mask = torch.ones_like(ids)

    def ours() -> "Tensor":
        with torch.no_grad():
            embeddings = model.embed(ids)
        return greedy(model, embeddings, mask, max_new_tokens=NEW_TOKENS, eos_id=-1)

    label = f"{config.depth} x {config.width}, batch {batch}"
    shared: dict[str, Any] = {"items": batch * NEW_TOKENS, "unit": "tokens", "repetitions": 9}
    peers = []
    theirs = _transformers(model, ids, label, shared)
    if isinstance(theirs, LeftOut):
        yield theirs
    else:
        peers = [theirs]
        wrong = int((theirs.call() != ours()).sum())
        shared |= {"against": theirs.name, "facts": {"tokens_that_differ": wrong}}
    own = Case(name=f"ours, {label}", call=ours, packages=PACKAGES, **shared)
    shared |= {"against": own.name, "facts": {}}
    limit = Case(
        name=f"limit, {label}", call=lambda: _products(model, batch), packages=PACKAGES, **shared
    )
    yield (*peers, own, limit)


def _products(model: "Decoder", batch: int) -> None:
    import torch
    from torch.nn.functional import linear

    kinds = ("linear", "head.")
    matrices = [w for name, w in model.named_parameters() if any(kind in name for kind in kinds)]
    with torch.no_grad():
        for weight in matrices * NEW_TOKENS:
            linear(torch.ones(batch, weight.shape[1]), weight)


def _transformers(model: "Decoder", ids: "Tensor", label: str, shared: dict) -> Case | LeftOut:
    name = f"transformers' generate, {label}"
    if importlib.util.find_spec("transformers") is None:
        return LeftOut(name=name, reason="transformers is not installed; `make bench LOCK=bench`")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlfoundry.models.decoder.hf_keys import decoder_keys
    from vlfoundry.models.families import write_official
    from vlfoundry.models.official.keymap import split_all

    config = model.decoder_config
    peer: Any = LlamaForCausalLM(LlamaConfig(**write_official(config))).eval()
    peer.load_state_dict(split_all(decoder_keys(config), model.state_dict()))
    mask = torch.ones_like(ids)

    def generate() -> "Tensor":
        new = peer.generate(
            ids, attention_mask=mask, do_sample=False, use_cache=True,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return new[:, ids.shape[1] :]

    return Case(name=name, call=generate, packages=("transformers", "torch"), **shared)
