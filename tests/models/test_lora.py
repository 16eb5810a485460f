"""Adapters: nothing before training, the same in every layout, and folded in without a trace.

There is no recorded official model with adapters; that the numbers are right is shown by merged
against unmerged, with the merge of official weights restated here as W + alpha / r * B A.
"""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_parallel import loss_of
from tests.support.tiny_models import TEXTS, chat_batch, pixels, texts, three_tasks, tiny_config
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.backend.world import this_rank
from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.loop import fit
from vlfoundry.infra.train.weights import gather_weights, load_weights
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.convert import export_model, import_model, merge_model
from vlfoundry.models.internvl.freeze import freeze
from vlfoundry.models.internvl.lora import adapters
from vlfoundry.models.internvl.model import InternVL, build
from vlfoundry.models.internvl.predict import load_parts, read_config, read_weights, save_model
from vlfoundry.models.layers.canonical import initialise, set_rule
from vlfoundry.models.layers.config import LoraConfig
from vlfoundry.models.layers.linear import ColumnLinear, RowLinear
from vlfoundry.models.layers.lora import Lora
from vlfoundry.models.layers.parallel import process_groups, stack_config, tensor_group
from vlfoundry.models.objectives.next_token import ChatObjective, NextTokenConfig
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "eval" / "golden"
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0)
ADAPTED = tiny_config().with_lora(vision=LORA, text=LORA, language=LORA)
STD = 0.1


def calm_config() -> InternVLConfig:
    """Weights so small that rounding stays rounding.

    With those of `tiny_config` half a unit in the last place of each weight moves the logits of a
    chat model by 1.7e-6 of the largest.
    """
    parts = (getattr(ADAPTED, name) for name in ("vision", "text", "language", "queries"))
    vision, text, language, queries = (dataclasses.replace(p, init_std=STD) for p in parts)
    return dataclasses.replace(
        ADAPTED, vision=vision, text=text, language=language, queries=queries
    )


def trained_like(kind: str, config=ADAPTED, *, seed: int = 3, std: float = 0.3) -> InternVL:
    """A model whose B are not zero, the same in every layout."""
    model = build(kind, config, seed=seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            set_rule(parameter, "normal", std)
    initialise(model, seed)
    return model


def output(model: InternVL) -> torch.Tensor:
    """Numbers that every part of the model has a share in."""
    model.eval()
    with torch.no_grad():
        if model.kind == "vision":
            return model.vision(pixels(2))
        if model.kind == "text":
            return model.text.logits(model.text.encode(*texts(2)))
        if model.kind.startswith("chat"):
            batch = chat_batch(model.model_config, model.kind, 2)
            images = pixels(2, model.model_config.vision.image_px)
            return model.language.logits(model.chat_hidden(batch["ids"], images))
        if model.kind == "internvl_g":
            three = three_tasks(model, pixels(2), texts(2), texts(2), texts(2))
            return torch.cat([model.embed_images(pixels(2)), three["image"], three["text"]])
        return torch.cat([model.embed_images(pixels(2)), model.embed_texts(*texts(2))])


@pytest.mark.parametrize("kind", PARTS)
def test_it_starts_as_the_base_model_bit_for_bit(kind):
    base, adapted = build(kind, tiny_config(), seed=3), build(kind, ADAPTED, seed=3)
    there = dict(adapted.named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, there.pop(name)), name
    assert there
    assert all(".lora." in name for name in there)
    assert torch.equal(output(base), output(adapted))
    assert not torch.equal(output(base), output(trained_like(kind)))


def gradients(kind: str, tensor: int):
    """Rank 0: loss, whole weights, and whole gradients of the adapters alone."""
    with parallel(Layout(tensor=tensor)):
        model = trained_like(kind)
        names = freeze(model, "lora")
        loss = loss_of(kind, model)
        loss.backward()
        weights = gather_weights(model)
        for parameter in model.parameters():
            assert (parameter.grad is None) != parameter.requires_grad
            if parameter.requires_grad:
                parameter.data = parameter.grad
        whole = gather_weights(model)
    if whole is None:
        return None
    weights = {name: weight.numpy() for name, weight in weights.items()}
    return loss.item(), weights, {name: whole[name].numpy() for name in names}


@pytest.mark.parametrize("kind", ["internvl_g", "chat_simple"])
def test_two_tensor_ranks_equal_one(kind):
    """The vision tower has 5 heads, which are padded to 6; the decoders have 2 groups of heads."""
    one = run_ranks(gradients, kind, 1, ranks=1)[0]
    two = run_ranks(gradients, kind, 2, ranks=2)[0]
    assert abs(one[0] - two[0]) < 1e-6 * abs(one[0])
    for name, weight in one[1].items():
        assert np.array_equal(weight, two[1][name]), name
    for name, gradient in one[2].items():
        scale = np.abs(gradient).max()
        assert scale > 0, name
        assert np.abs(gradient - two[2][name]).max() <= 1e-5 * scale, name


def sequence_parallel_pair(tensor: int, sequence: bool):
    """Each rank: outputs and whole gradients of a column and a row linear with adapters."""
    with parallel(Layout(tensor=tensor)):
        config = stack_config(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            sequence_parallel=sequence,
        )
        make = {"config": config, "init_method": None, "bias": False, "tp_group": tensor_group()}
        net = torch.nn.ModuleList(
            [
                ColumnLinear(8, 12, gather_output=False, **make),
                RowLinear(12, 8, input_is_parallel=True, skip_bias_add=False, **make),
            ]
        )
        for linear in net:
            set_rule(linear.weight, "normal", 0.3)
            linear.weight.requires_grad_(False)
            linear.lora = Lora(linear, LORA, (linear.weight.shape[0],))
            set_rule(linear.lora.b, "normal", 0.3)
        initialise(net, 0)
        x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(1))
        mine = slice(None)
        if sequence:
            mine = slice(2 * tensor_group().rank(), 2 * tensor_group().rank() + 2)
        x = x[mine].requires_grad_()
        hidden, _ = net[0](x)
        y, _ = net[1](torch.tanh(hidden))
        (y * torch.arange(1.0, 65).view(4, 2, 8)[mine]).sum().backward()
        found = {"y": y.detach(), "x": x.grad}
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                if getattr(parameter, "sequence_parallel", False):  # as Megatron does
                    torch.distributed.all_reduce(gradient, group=process_groups().tp)
                found[name] = gradient
        return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("sequence", [False, True])
def test_replicated_matrices_have_whole_gradients(sequence):
    one = run_ranks(sequence_parallel_pair, 1, False, ranks=1)[0]
    ranks = run_ranks(sequence_parallel_pair, 2, sequence, ranks=2)
    axes = {"0.lora.b": 0, "1.lora.a": 1} | ({"y": 0, "x": 0} if sequence else {})
    assert set(one) == {"y", "x", "0.lora.a", "0.lora.b", "1.lora.a", "1.lora.b"}
    for name, expected in one.items():
        parts = [rank[name] for rank in ranks]
        got = [np.concatenate(parts, axes[name])] if name in axes else parts
        for part in got:
            assert np.abs(part - expected).max() <= 1e-5 * np.abs(expected).max(), name


def dropped():
    """Each rank: what a column and a row linear's adapters leave of ones, and of a whole model."""
    with parallel(Layout(tensor=2)):
        half = LoraConfig(rank=3, dropout=0.5)
        model = trained_like("vision", ADAPTED.with_lora(vision=half)).train()
        attention = model.vision.decoder.layers[0].self_attention
        ones = torch.ones(3, 2, 8)
        left = [part.lora._dropped(ones) for part in (attention.linear_qkv, attention.linear_proj)]
        out = model.vision(pixels(2)).detach()
        assert not torch.equal(out, model.vision(pixels(2)))
        return [value.numpy() for value in (*left, out)]


def test_dropout_over_tensor_ranks():
    (column, row, out), (column2, row2, out2) = run_ranks(dropped, ranks=2)
    assert set(np.unique(column)) == {0, 2}
    assert np.array_equal(column, column2), "both ranks see the same input"
    assert not np.array_equal(row, row2), "the ranks see different channels"
    assert np.array_equal(out, out2)


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS * 3, 320)


def from_folder(folder: Path) -> InternVL:
    kind, config = read_config(folder)
    model = build(kind, config, seed=9)
    load_weights(model, folder / "weights.safetensors")
    return model


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", PARTS)
def test_merged_equals_unmerged(kind, tokenizer, tmp_path):
    config = calm_config()
    model = trained_like(kind, config, std=STD)
    assert relative(output(build(kind, config, seed=3)), output(model)) > 0.1
    save_model(tmp_path / "lora", kind, config, model, tokenizer)
    assert torch.equal(output(from_folder(tmp_path / "lora")), output(model))
    towers = [t for t in ("vision", "text", "language") if t in PARTS[kind]]
    assert merge_model(tmp_path / "lora", tmp_path / "merged") == 2 * 4 * len(towers)

    merged = from_folder(tmp_path / "merged")
    assert not [n for n, _ in merged.named_parameters() if ".lora." in n]
    assert read_config(tmp_path / "merged") == (kind, config.with_lora())
    assert relative(output(merged), output(model)) < 1e-6
    with pytest.raises(ModelError, match="nothing to merge"):
        merge_model(tmp_path / "merged", tmp_path / "again")


@pytest.mark.parametrize("format", ["internvl_chat", "transformers"])
def test_export_merges_and_reloads(format, tokenizer, tmp_path):
    config = calm_config()
    model = trained_like("chat_simple", config, std=STD)
    save_model(tmp_path / "lora", "chat_simple", config, model, tokenizer)
    export_model(tmp_path / "lora", tmp_path / "out", format)
    assert not [n for n in load_file(tmp_path / "out" / "model.safetensors") if "lora" in n]
    import_model(tmp_path / "out", tmp_path / "again")
    assert relative(output(from_folder(tmp_path / "again")), output(model)) < 1e-6
    merge_model(tmp_path / "lora", tmp_path / "merged")
    merged, again = (read_weights(tmp_path / name) for name in ("merged", "again"))
    assert merged.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in merged.items())


def official_with_peft(folder: Path, *, base_layer: bool) -> dict[str, torch.Tensor]:
    """A chat folder as PEFT leaves it; returns the official weights with everything merged."""
    shutil.copytree(GOLDEN / "internvl_chat", folder)
    facts = json.loads((folder / "config.json").read_text())
    facts |= {"use_backbone_lora": 4, "use_llm_lora": 2, "template": "kept"}
    (folder / "config.json").write_text(json.dumps(facts))
    weights = load_file(folder / "weights.safetensors")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    linears = {
        "vision_model": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        "language_model": (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        ),
    }
    generator = torch.Generator().manual_seed(0)
    wrapped, merged = {}, dict(weights)
    for name, weight in weights.items():
        tower, _, rest = name.partition(".")
        if tower not in linears:
            wrapped[name] = weight
            continue
        module, _, leaf = f"{tower}.base_model.model.{rest}".rpartition(".")
        if not module.endswith(linears[tower]):
            wrapped[f"{module}.{leaf}"] = weight
            continue
        wrapped[f"{module}.base_layer.{leaf}" if base_layer else f"{module}.{leaf}"] = weight
        if leaf == "weight":
            rank = 4 if tower == "vision_model" else 2
            a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            wrapped |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
            merged[name] = weight + 2.0 * (b @ a)
    save_file({n: t.contiguous() for n, t in wrapped.items()}, folder / "model.safetensors")
    return merged


@pytest.mark.parametrize("base_layer", [False, True])
def test_official_adapters_that_nobody_merged(base_layer, tmp_path):
    merged = official_with_peft(tmp_path / "peft", base_layer=base_layer)
    shutil.copytree(GOLDEN / "internvl_chat", tmp_path / "whole")
    save_file(merged, tmp_path / "whole" / "weights.safetensors")
    import_model(tmp_path / "whole", tmp_path / "expected")
    done = import_model(tmp_path / "peft", tmp_path / "ours")
    assert done.left_out == ()
    _, config = read_config(tmp_path / "ours")
    assert config.vision.lora == LoraConfig(rank=4, alpha=8, dropout=0.05)
    assert config.chat.lora == LoraConfig(rank=2, alpha=4, dropout=0.05)

    unmerged, expected = (from_folder(tmp_path / name) for name in ("ours", "expected"))
    assert relative(output(unmerged), output(expected)) < 1e-6
    import_model(tmp_path / "peft", tmp_path / "vision", kind="vision")
    tower = from_folder(tmp_path / "vision").eval()
    assert torch.equal(tower.vision(pixels(1, 28)), unmerged.vision(pixels(1, 28)))

    export_model(tmp_path / "ours", tmp_path / "back", "internvl_chat")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == merged.keys()
    for name, weight in merged.items():
        assert torch.allclose(back[name], weight, rtol=1e-6, atol=1e-7), name
    facts = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (facts["use_backbone_lora"], facts["use_llm_lora"]) == (0, 0)
    assert facts["template"] == "kept"


def test_what_does_not_fit_is_refused(tokenizer, tmp_path):
    official_with_peft(tmp_path / "peft", base_layer=True)
    weights = load_file(tmp_path / "peft" / "model.safetensors")
    first = min(name for name in weights if "lora_A" in name)
    del weights[first]
    save_file(weights, tmp_path / "peft" / "model.safetensors")
    with pytest.raises(ModelError, match=f"1 missing: {first}"):
        import_model(tmp_path / "peft", tmp_path / "ours")
    shutil.copytree(GOLDEN / "internvl_14b", tmp_path / "14b")
    facts = json.loads((tmp_path / "14b" / "config.json").read_text())
    (tmp_path / "14b" / "config.json").write_text(json.dumps(facts | {"use_qllama_lora": 16}))
    with pytest.raises(ConfigError, match="another alpha"):
        import_model(tmp_path / "14b", tmp_path / "ours")

    save_model(tmp_path / "chat", "chat_simple", ADAPTED, trained_like("chat_simple"), tokenizer)
    parts = {"language": "language"}
    louder = ADAPTED.with_lora(language=dataclasses.replace(LORA, alpha=9.0))
    for other in (tiny_config(), louder):
        with pytest.raises(ModelError, match=r"'language' of .* has adapters .* `vlfoundry merge`"):
            load_parts(build("chat_simple", other), tmp_path / "chat", parts)
    dropping = ADAPTED.with_lora(language=dataclasses.replace(LORA, dropout=0.5))
    same = build("chat_simple", dropping)
    assert load_parts(same, tmp_path / "chat", parts) == []
    weights = read_weights(tmp_path / "chat")
    del weights["language.decoder.layers.1.mlp.linear_fc1.lora.b"]
    save_file(weights, tmp_path / "chat" / "weights.safetensors")
    with pytest.raises(ModelError, match=r"1 missing: language\.decoder\.layers\.1\.mlp"):
        merge_model(tmp_path / "chat", tmp_path / "merged")
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"linears": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoraConfig(**wrong)


def test_chosen_linears_alone():
    only = LoraConfig(rank=2, linears=("qkv", "fc2"))
    model = build("chat_simple", tiny_config().with_lora(language=only))
    found = {n for n, _ in model.named_parameters() if ".lora." in n}
    assert {n.split(".lora.")[0].rsplit(".", 1)[1] for n in found} == {"linear_qkv", "linear_fc2"}
    assert all(n.startswith("language.") for n in found)
    wanted = {
        key.ours: key.shape
        for pairs in adapters(model.model_config, "chat_simple").values()
        for key in (pairs.a, pairs.b)
    }
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n in found}
    assert wanted == shapes


CONFIG = TrainConfig(
    steps=10, batch_samples=4, lr=2e-2, warmup_steps=2, save_every_steps=5, eps=1e-8
)


def training(work: Path, layout: Layout, stop: int | None = None):
    """Rank 0: history, weights before and after, the buffers' sizes and the trained parameters."""
    half = LoraConfig(rank=3, alpha=6.0, dropout=0.3)
    config = tiny_config().with_lora(vision=half, language=half)
    with parallel(layout, seed=1):
        model = build("chat_simple", config, seed=3)
        before = gather_weights(model)
        names = freeze(model, ("lora", "connector"))
        batch = chat_batch(config, "chat_simple", 4)

        def batch_at(step: int):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch

        result = fit(
            model, ChatObjective(NextTokenConfig()), batch_at, CONFIG,
            work=work, run_key="key", layout=layout, log=lambda _line: None,
        )  # fmt: skip
        buffered = {n for n, p in model.named_parameters() if hasattr(p, "main_grad")}
        after = gather_weights(model)
    if this_rank().index:
        return None
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    return result, set(names), buffered, changed, {n: w.numpy() for n, w in after.items()}


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["one", "tensor"])
def test_training_moves_the_adapters_and_resumes_bit_identical(layout, tmp_path):
    whole = run_ranks(training, tmp_path / "whole", layout, ranks=layout.ranks)[0]
    result, names, buffered, changed, weights = whole
    losses = [row["loss"] for row in result.history]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert names == buffered == changed
    assert {n.split(".")[0] for n in names} == {"vision", "language", "connector"}
    assert all(n.startswith("connector.") or ".lora." in n for n in names)

    first = run_ranks(training, tmp_path / "cut", layout, 6, ranks=layout.ranks)[0]
    assert first[0].interrupted
    second = run_ranks(training, tmp_path / "cut", layout, ranks=layout.ranks)[0]
    assert second[0].resumed_from == first[0].steps
    assert second[0].history == result.history
    assert all(np.array_equal(second[4][name], weight) for name, weight in weights.items())
