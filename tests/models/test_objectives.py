"""The losses: where they start, what they ignore, how they average."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from tests.support.tiny_models import pixels, stage2_batch, texts, tiny_config
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.internvit.config import internvit
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.freeze import freeze
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.objectives.contrastive import (
    Contrastive,
    ContrastiveConfig,
    distinct_texts,
    info_nce,
    share_right,
)
from vlfoundry.models.objectives.generative import (
    Generative,
    GenerativeConfig,
    hard_negatives,
    random_negatives,
)
from vlfoundry.models.objectives.next_token import (
    IGNORE,
    NextTokenConfig,
    next_token,
    token_weights,
)
from vlfoundry.models.objectives.retrieval import RetrievalConfig

pytestmark = pytest.mark.slow


def test_contrastive_starts_near_ln_batch_and_learns():
    torch.manual_seed(0)
    config = InternVLConfig(
        vision=internvit("small", image_px=32, init_std=0.06),
        text=DecoderConfig(init_std=0.06),
        head_init_std=0.06,
    )
    model = build("internvl_c", config)
    ids = torch.randint(12, 4096, (32, 8))
    ids[:, :4] = torch.tensor([1, 20, 21, 22])  # begin and "summarize:"
    ids[:, -1] = 2
    squares = torch.rand(32, 3, 1, 1).expand(-1, -1, 16, 16)
    batch = {
        "pixels": torch.nn.functional.pad(squares, (8, 8, 8, 8), value=1.0),
        "ids": ids,
        "mask": torch.ones_like(ids),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(25):
        loss, metrics = Contrastive()(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(32), rel=0.1)
    assert losses[-1] < 0.95 * math.log(32)
    assert metrics["logit_scale"] == pytest.approx(1 / 0.07, rel=0.1)


def test_the_sigmoid_loss_learns_its_bias_and_to_tell_pairs_apart():
    config = tiny_config(head_init_std=None).for_sigmoid()
    model = build("internvl_c", config)
    objective = Contrastive(ContrastiveConfig(loss="sigmoid"))
    ids, mask = texts(8)
    batch = {"pixels": pixels(8), "ids": ids, "mask": mask}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        loss, metrics = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: float(value) for name, value in metrics.items()})
    first, last = history[0], history[-1]
    assert (first["logit_scale"], first["logit_bias"]) == (pytest.approx(10), -10)
    # All pairs are far on the side of no match, where most of them belong.
    assert first["loss"] == pytest.approx(10, abs=8)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] > first["accuracy"]
    assert last["logit_bias"] != -10


def test_accuracy_of_the_sigmoid_loss_is_that_of_the_softmax_loss():
    images, captions = unit(9), unit(9).flip(0)
    group = torch.arange(9) // 2
    _, wanted = info_nce(images, captions, torch.tensor(1.0), ContrastiveConfig(), group=group)
    assert share_right(images, captions, group=group) == wanted
    assert share_right(images, images) == 1


def test_the_sigmoid_loss_is_refused_where_it_is_not_meant():
    sigmoid = ContrastiveConfig(loss="sigmoid")
    for make in (GenerativeConfig, RetrievalConfig):
        with pytest.raises(ConfigError, match=r"expected \"softmax\""):
            make(contrastive=sigmoid)
    with pytest.raises(ConfigError, match="label_smoothing is 0"):
        ContrastiveConfig(loss="sigmoid", label_smoothing=0.1)


def test_each_distinct_caption_is_encoded_once():
    model = build("internvl_c", tiny_config())
    ids, mask = texts(4)
    ids[2], mask[2] = ids[0], mask[0]
    plan = distinct_texts(ids, mask)
    assert sum(len(batch["ids"]) for batch in plan.batches) == 3
    got = plan.assemble([model.run("text", batch) for batch in plan.batches])["text"]
    assert torch.allclose(got, model.embed_texts(ids, mask), atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_pipeline_gets_as_many_text_batches_as_it_needs(parts):
    ids, mask = texts(5)
    plan = distinct_texts(ids, mask, parts)
    assert len(plan.batches) % parts == 0
    got = plan.assemble([{"first": batch["ids"][:, 1]} for batch in plan.batches])["first"]
    assert torch.equal(got, ids[:, 1])


def unit(rows: int, width: int = 5) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)), dim=1)


def test_info_nce_by_hand():
    images, captions, scale = unit(3), unit(4)[:3], torch.tensor(1.5)
    logits = scale.exp() * images @ captions.T
    rows, columns = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    loss, _ = info_nce(images, captions, scale, ContrastiveConfig())
    assert loss == pytest.approx(-(rows.mean() + columns.mean()).item() / 2, rel=1e-5)
    alone, _ = info_nce(
        images, captions, scale, ContrastiveConfig(), valid=torch.tensor([True, False, True])
    )
    expected = -(rows[[0, 2]].mean() + columns[[0, 2]].mean()) / 2
    assert alone == pytest.approx(expected.item(), rel=1e-5)


def test_one_group_shares_its_target():
    images, captions, scale = unit(3), unit(4)[:3], torch.tensor(0.5)
    grouped, _ = info_nce(
        images, captions, scale, ContrastiveConfig(), group=torch.tensor([7, 8, 7])
    )
    target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    logits = scale.exp() * images @ captions.T
    by_hand = -((target * logits.log_softmax(1)).sum(1) + (target * logits.T.log_softmax(1)).sum(1))
    assert grouped == pytest.approx(by_hand.mean().item() / 2, rel=1e-5)
    plain, _ = info_nce(images, captions, scale, ContrastiveConfig())
    own, _ = info_nce(images, captions, scale, ContrastiveConfig(), group=torch.arange(3))
    assert own == pytest.approx(plain.item(), rel=1e-6)


def test_temperature_ceiling():
    images, captions = unit(3), unit(4)[:3]
    free, _ = info_nce(images, captions, torch.tensor(9.0), ContrastiveConfig(max_logit_scale=None))
    capped, _ = info_nce(images, captions, torch.tensor(9.0), ContrastiveConfig())
    at_ceiling, _ = info_nce(images, captions, torch.tensor(100.0).log(), ContrastiveConfig())
    assert capped == pytest.approx(at_ceiling.item(), rel=1e-5)
    assert free != pytest.approx(capped.item(), rel=1e-2)


def test_stage_2_gives_gradients_to_what_it_trains():
    model = build("internvl_g", tiny_config())
    trained = freeze(model, "stage2")
    loss, metrics = Generative()(model, stage2_batch(5))
    loss.backward()
    assert loss.item() == pytest.approx(sum(metrics[k].item() for k in ("itm", "itc", "itg")))
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trained)


class Recorded:
    """Answers with embeddings whose cosines are those of a matrix."""

    def __init__(self, similarity: torch.Tensor):
        self.similarity = similarity

    def collect(self, path, batch):
        if path == "text":
            return {"text": torch.eye(4)}
        return {"image": self.similarity}


def test_hard_negatives_are_similar_but_not_the_same():
    batch = stage2_batch(4)
    run = Recorded(torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.9, 0.8, 0.1]]))
    asked = torch.tensor([True, True, False, False])

    def chosen():
        (ids, _), there_is = hard_negatives(run, batch, asked)
        rows = [(batch["positive_ids"] == row).all(1).nonzero()[0, 0].item() for row in ids[:2]]
        return rows, there_is[:2].tolist()

    assert chosen()[0] == [2, 2]
    batch["positive_ids"][2] = batch["positive_ids"][0]  # the same words: no negative
    assert chosen()[0] == [3, 0]  # rows 0 and 2 read alike
    batch["group"] = torch.tensor([0, 1, 2, 0])
    assert chosen() == ([1, 0], [True, True])
    batch["group"] = torch.tensor([0, 0, 0, 0])
    assert chosen()[1] == [False, False]


def test_random_negatives_are_any_of_the_wrong_captions():
    batch = stage2_batch(5)
    batch["group"] = torch.tensor([7, 8, 7, 9, 8])

    def chosen(draws):
        batch["draws"] = torch.tensor(draws, dtype=torch.float64)
        (ids, mask), there_is = random_negatives(batch)
        assert there_is.all()
        rows = [(batch["positive_ids"] == row).all(1).nonzero()[0, 0].item() for row in ids]
        assert torch.equal(mask, batch["positive_mask"][rows])
        return rows

    assert chosen([0.0] * 5) == [1, 0, 1, 0, 0]
    assert chosen([0.34, 0.34, 0.67, 0.25, 0.999]) == [3, 2, 4, 1, 3]
    for name in ("positive_ids", "positive_mask"):  # 3 says what 1 does, and 4 is of 1's group
        batch[name][3] = batch[name][1]
    assert chosen([0.999] * 5) == [4, 2, 4, 4, 2]
    batch["group"] = torch.full((5,), 3)
    assert not random_negatives(batch)[1].any()


def test_losses_have_weights_and_0_leaves_a_task_out():
    torch.manual_seed(0)
    model = build("internvl_g", tiny_config()).eval()
    batch = stage2_batch(6)
    _, terms = Generative(GenerativeConfig(negatives="given"))(model, batch)
    weights = {"itm": 0.0, "itc": 2.0, "itg": 0.5}
    loss, _ = Generative(GenerativeConfig(negatives="given", weights=weights))(model, batch)
    assert loss.item() == pytest.approx((2 * terms["itc"] + 0.5 * terms["itg"]).item(), rel=1e-6)
    for wrong in ({"itm": 1.0}, {**weights, "itm": -1.0}, dict.fromkeys(weights, 0.0)):
        with pytest.raises(ConfigError, match="expected a number from 0 for each of itm, itc"):
            GenerativeConfig(weights=wrong)


def test_empty_texts_are_ignored():
    model = build("internvl_g", tiny_config()).eval()
    config = GenerativeConfig(negatives="given", empty_summary_tokens=5)
    batch = stage2_batch(4)
    batch["positive_mask"][3] = torch.tensor([1, 1, 0, 0, 0, 0, 0])
    batch["summary_mask"][1] = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    objective = Generative(config)
    matching, is_match, counts = objective.matching(model, batch)
    assert is_match.tolist() == [0, 0, 1, 1]
    assert counts.tolist() == [True, True, True, False]
    assert torch.equal(matching[0][0], batch["negative_ids"][0])
    assert torch.equal(matching[0][3], batch["positive_ids"][3])
    assert torch.isfinite(objective(model, batch)[0])
    with pytest.raises(ConfigError, match="negative_ids"):
        objective(model, {n: t for n, t in batch.items() if not n.startswith("negative")})


def test_averaging_of_tokens():
    learnt = torch.tensor([[True] * 4, [True, False, False, False]])
    assert token_weights(learnt, "token")[:, 0].tolist() == [1.0, 1.0]
    assert token_weights(learnt, "sample")[:, 0].tolist() == [0.25, 1.0]
    assert token_weights(learnt, "square")[:, 0].tolist() == [0.5, 1.0]

    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORE, 0, 1, 2, 0], [IGNORE, 2, IGNORE, IGNORE, IGNORE]])
    by_row = [
        torch.nn.functional.cross_entropy(hidden[i, :-1], labels[i, 1:], ignore_index=IGNORE)
        for i in range(2)
    ]
    token, _ = next_token(hidden, labels, lambda x: x, NextTokenConfig())
    sample, _ = next_token(hidden, labels, lambda x: x, NextTokenConfig(averaging="sample"))
    assert token == pytest.approx((4 * by_row[0] + by_row[1]).item() / 5, rel=1e-5)
    assert sample == pytest.approx((by_row[0] + by_row[1]).item() / 2, rel=1e-5)


def test_a_batch_without_labels_costs_nothing():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss, metrics = next_token(hidden, torch.full((1, 3), IGNORE), lambda x: x, NextTokenConfig())
    loss.backward()
    assert loss.item() == 0.0
    assert metrics["token_accuracy"] == 0.0


@pytest.mark.parametrize("task", ["itm", "itc", "itg"])
def test_each_loss_of_stage_2_alone_learns_a_batch_by_heart(task):
    torch.manual_seed(0)
    model = build("internvl_g", tiny_config())
    freeze(model, ("stage2", "text"))
    batch = stage2_batch(9)
    batch["group"] = torch.tensor([0, 1, 2, 3, 4, 3, 6, 7, 8])
    weights = dict.fromkeys(("itm", "itc", "itg"), 0.0) | {task: 1.0}
    objective = Generative(GenerativeConfig(negatives="random", weights=weights))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(150):
        loss, metrics = objective(model, batch)
        if metrics[f"{task}_accuracy"] == 1 and loss < 0.2:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics[f"{task}_accuracy"] == 1, metrics


def test_both_heads_keep_a_trained_text_tower_in_touch_with_the_vision_tower():
    model = build("internvl_g", tiny_config())
    freeze(model, ("text",))
    batch, itc = stage2_batch(6), {"itm": 0.0, "itc": 1.0, "itg": 0.0}
    ready = Generative(GenerativeConfig(negatives="given")).prepare(None, batch)
    out = model.run("tasks", ready)
    rows = {"valid": ready["summarised"], "total": ready["total_summarised"]}
    heads = [
        info_nce(out[head], out["text"], model.logit_scale, ContrastiveConfig(), **rows)[0].item()
        for head in ("image", "backbone")
    ]
    both = Generative(GenerativeConfig(negatives="given", heads="both", weights=itc))
    assert both(model, batch)[0].item() == pytest.approx(sum(heads) / 2, rel=1e-6)
