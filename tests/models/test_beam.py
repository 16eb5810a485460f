"""Beam search against all continuations, and against greedy."""

import itertools

import pytest
import torch

from vlfoundry.models.decoder.beam import beam_search
from vlfoundry.models.decoder.generate import causal_blocked, greedy
from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.layers.canonical import initialise
from vlfoundry.models.layers.config import DecoderConfig

VOCAB, STEPS, END = 5, 3, 2


@pytest.fixture
def llama():
    config = DecoderConfig(
        vocab_size=VOCAB, width=16, depth=2, heads=2, mlp_hidden=12, init_std=0.6
    )
    model = Decoder(config).eval()
    initialise(model, 7)
    return model


@pytest.fixture
def prompt():
    """Ids and mask of two left-padded prompts, and who is blocked."""
    ids = torch.tensor([[0, 1, 3, 4], [1, 4, 4, 3]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    return ids, mask, causal_blocked(4) | ~mask.bool()[:, None, None, :]


def best_of_all(model, prompt_ids: list[int]) -> list[int]:
    """By mean log-probability, the end token counted, of all that end or are as long as allowed."""
    found = []
    for tokens in itertools.product(range(VOCAB), repeat=STEPS):
        length = tokens.index(END) + 1 if END in tokens else STEPS
        ids = torch.tensor([prompt_ids + list(tokens[:length])])
        with torch.no_grad():
            steps = model.logits(model(model.embed(ids)))[0].log_softmax(-1)
        start = len(prompt_ids) - 1
        total = sum(steps[start + i, tokens[i]].item() for i in range(length))
        kept = tokens[:length]
        found.append((total / length, [t for t in kept if t != END]))
    return max(found)[1]


def test_with_enough_beams_it_finds_the_best(llama, prompt):
    ids, mask, blocked = prompt
    got = beam_search(
        llama, llama.embed(ids), mask,
        prefix_mask=blocked, max_new_tokens=STEPS, eos_id=END, beams=VOCAB**STEPS,
    )  # fmt: skip

    assert got == [best_of_all(llama, [1, 3, 4]), best_of_all(llama, [1, 4, 4, 3])]


def test_one_beam_is_greedy(llama, prompt):
    ids, mask, blocked = prompt
    options = {"prefix_mask": blocked, "max_new_tokens": 6, "eos_id": -1}
    got = beam_search(llama, llama.embed(ids), mask, beams=1, **options)

    assert got == greedy(llama, llama.embed(ids), mask, **options).tolist()
