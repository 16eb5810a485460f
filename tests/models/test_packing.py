"""Packed samples: the logits, gradients and losses of samples that are alone, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import VOCAB, pixels, texts, tiny_config
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.chat.examples import Example, packed
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.model import InternVL, build
from vlfoundry.models.internvl.prompts import IGNORE, labelled_rows
from vlfoundry.models.layers.attention import SDPAttention
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.layers.packing import (
    pack_rows,
    packed_positions,
    sample_of_token,
    split_packs,
)
from vlfoundry.models.objectives.common import Batch
from vlfoundry.models.objectives.next_token import (
    ChatObjective,
    NextTokenConfig,
    TextObjective,
    token_weights,
)
from vlfoundry.models.tokenizer import IMG_CONTEXT_ID

REL = 1e-5
LENGTHS = {"all different": (3, 9, 5, 1, 7), "some alike": (4, 9, 4, 2, 9, 4)}
TILES = (2, 0, 1, 3)
"""tiles of each conversation"""


def rows_of(lengths: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Given and learnt ids of texts of these lengths."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(12, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    return [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]


def conversations(config: InternVLConfig) -> list[tuple[list[int], list[int]]]:
    per_tile = config.visual_tokens("chat_simple")
    words = rows_of((4, 7, 5, 6))
    return [
        ([1, *[IMG_CONTEXT_ID] * per_tile * tiles, *given], learnt)
        for tiles, (given, learnt) in zip(TILES, words, strict=True)
    ]


def batches(rows: list[tuple[list[int], list[int]]], **more: Tensor) -> tuple[Batch, Batch]:
    """The same rows padded and packed."""
    ids, mask, labels = map(torch.from_numpy, labelled_rows(rows, 0))
    padded = {"ids": ids, "mask": mask, "labels": labels, **more}
    examples = [
        Example(
            ids=given + learnt,
            labels=[IGNORE] * len(given) + learnt,
            tiles=0,
            pictures=lambda: np.empty((0, 8, 8, 3), np.uint8),
        )
        for given, learnt in rows
    ]
    made = {name: torch.from_numpy(values) for name, values in packed(examples).items()}
    return padded, {name: made[name] for name in ("ids", "labels", "cu_seqlens")} | more


def assert_same(got: Tensor, expected: Tensor, name: str = "") -> None:
    error = (got - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error < REL, f"{name}: relative error {error:.1e}"


def gradients(model: InternVL, objective, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss, _ = objective(model, batch)
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same_training(model: InternVL, objective, padded: Batch, packed: Batch) -> None:
    (loss, expected), (packed_loss, got) = (
        gradients(model, objective, batch) for batch in (padded, packed)
    )
    assert packed_loss.item() == pytest.approx(loss.item(), rel=REL)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same(got[name], gradient, name)


@pytest.fixture(scope="module")
def text() -> InternVL:
    return build("text", tiny_config(), seed=3)


@pytest.fixture(scope="module")
def chat() -> InternVL:
    """The language model has full heads; the text tower's are grouped."""
    words = DecoderConfig(vocab_size=VOCAB, width=16, depth=2, heads=2, mlp_hidden=12, init_std=0.3)
    return build("chat_simple", tiny_config(language=words), seed=3)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_logits_of_a_text_do_not_depend_on_its_neighbours(text, lengths):
    padded, packed = batches(rows_of(lengths))
    tower = text.text

    got = tower.logits(tower.encode(packed["ids"], packed["cu_seqlens"]))[0]

    expected = tower.logits(tower.encode(padded["ids"], padded["mask"]))[padded["mask"].bool()]
    assert_same(got, expected)


@pytest.mark.parametrize("averaging", ["token", "sample", "square"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_texts_train_alike(text, lengths, averaging):
    objective = TextObjective(NextTokenConfig(averaging=averaging))
    assert_same_training(text, objective, *batches(rows_of(lengths)))


def test_without_labels_no_text_begins_another(text):
    padded, packed = batches(rows_of(LENGTHS["some alike"]))
    del padded["labels"], packed["labels"]
    assert_same_training(text, TextObjective(), padded, packed)


@pytest.mark.parametrize("averaging", ["token", "square"])
def test_conversations_with_tiles_train_alike(chat, averaging):
    config = chat.model_config
    padded, packed = batches(conversations(config), pixels=pixels(sum(TILES)))
    objective = ChatObjective(NextTokenConfig(averaging=averaging))
    assert_same_training(chat, objective, padded, packed)
    got, expected = (chat.run("chat", batch)["hidden"] for batch in (packed, padded))
    assert_same(got[0], expected[padded["mask"].bool()])


def test_embeddings_of_packed_captions():
    model = build("internvl_c", tiny_config(), seed=3)
    ids, mask = texts(6)
    assert_same(model.embed_texts(*pack_rows(ids, mask)), model.embed_texts(ids, mask))


def test_the_comparison_notices_a_forgotten_mask(text, monkeypatch):
    """(Positions that run on would change nothing: rotary ones are relative.)"""

    def whole(self, query, key, value, _cu_seqlens):
        return self._attend(query, key, value).reshape(len(query), 1, -1)

    monkeypatch.setattr(SDPAttention, "_packed", whole)
    with pytest.raises(AssertionError, match=r"relative error|=="):
        assert_same_training(text, TextObjective(), *batches(rows_of(LENGTHS["some alike"])))


def test_positions_and_samples():
    cu_seqlens = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    assert packed_positions(cu_seqlens, 1, 6).tolist() == [[0, 1, 2, 0, 0, 1]]
    assert sample_of_token(cu_seqlens).tolist() == [0, 0, 0, 1, 2, 2]


def test_weights_count_each_samples_own_tokens():
    learnt = torch.tensor([[False, False, True, False, False, True, True, True, True]])
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    weights = token_weights(learnt, "sample", cu_seqlens)
    assert weights[learnt].tolist() == [1.0, 0.25, 0.25, 0.25, 0.25]


def test_packs_are_micro_batches(chat):
    rows = conversations(chat.model_config)
    _, whole = batches(rows, pixels=pixels(sum(TILES)))
    whole |= {"tiles": torch.tensor(TILES), "packs": torch.tensor([1, 2, 1])}
    start = 0
    for pack, samples in zip(split_packs(whole), ([0], [1, 2], [3]), strict=True):
        _, alone = batches([rows[i] for i in samples])
        for name in ("ids", "labels", "cu_seqlens"):
            assert torch.equal(pack[name], alone[name])
        assert pack["cu_seqlens"].dtype == torch.int32
        end = start + sum(TILES[i] for i in samples)
        assert torch.equal(pack["pixels"], whole["pixels"][start:end])
        assert ChatObjective()(chat, pack)[0].isfinite()
        start = end


def test_ends_that_do_not_fit_are_refused(text):
    _, packed = batches(rows_of((3, 4)))
    wrong = packed["cu_seqlens"].clone()
    wrong[-1] -= 1
    with pytest.raises(ModelError, match="cu_seqlens ends at 6 for 1 rows of 7 tokens"):
        text.text.encode(packed["ids"], wrong)
