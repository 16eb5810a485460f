"""Golden folders of shapes that the recorded ones do not have."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.eval.parity.run import check_folder
from vlfoundry.flows.cli import app
from vlfoundry.infra.backend.devices import find_device
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.internvl.convert import export_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import save_model
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.skipif(
    find_device().kind != "cpu", reason="recorded numbers are fp32 on a CPU"
)
PLACE = 5
"""id of a visual token's place"""


def official(folder: Path, kind: str, config, format: str) -> torch.nn.Module:
    """A model of ours, and its official config and weights as a golden folder has them."""
    model = build(kind, config, seed=3)
    made = folder.with_name(f"{folder.name}-made")
    save_model(made, kind, config, model, train(TEXTS * 3, 320))
    export_model(made, folder, format)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    return model.eval()


def chat_folder(folder: Path) -> Path:
    """A LLaMA with three groups of keys and values, recorded by transformers' own class."""
    from transformers import AutoModelForImageTextToText

    base = tiny_config()
    config = dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, depth=1),
        language=dataclasses.replace(
            base.text, width=36, heads=6, key_value_heads=3, vocab_size=331, max_tokens=90
        ),
        connector=ConnectorConfig(ps_version="v2", init_std=0.3),
    )
    official(folder, "chat_simple", config, "internvl_chat")
    export_model(folder.with_name(f"{folder.name}-made"), folder / "native", "transformers")
    facts = json.loads((folder / "config.json").read_text())
    facts["img_context_token_id"] = PLACE
    (folder / "config.json").write_text(json.dumps(facts))
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(20, 331, (2, 11), generator=generator)
    ids = torch.cat([words[:, :3], torch.full((2, 4), PLACE), words[:, 3:]], 1)
    labels = ids.clone()
    labels[:, :9] = -100
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "image_flags": torch.ones(2, 1, dtype=torch.long),
    }  # fmt: skip
    theirs = AutoModelForImageTextToText.from_pretrained(folder / "native").eval()
    with torch.no_grad():
        logits = theirs(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    save_file(inputs, folder / "inputs.safetensors")
    save_file({"logits": logits}, folder / "outputs.safetensors")
    return folder


def dual_folder(folder: Path, px: int) -> Path:
    """An InternVL-G of a 3 x 3 grid of patches, recorded by a model of ours."""
    base = tiny_config()
    config = dataclasses.replace(
        base, vision=dataclasses.replace(base.vision, image_px=px, patch_px=px // 3)
    )
    model = official(folder, "internvl_g", config, "internvl_14b")
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(12, 61, (3, 7), generator=generator)
    text[1, 5:] = 0
    pixels = torch.randn(2, 3, px, px, generator=generator)
    with torch.no_grad():
        cosine = model.embed_images(pixels) @ model.embed_texts(text, (text > 0).long()).T
    save_file({"pixel_values": pixels, "text": text}, folder / "inputs.safetensors")
    save_file({"G.cosine": cosine}, folder / "outputs.safetensors")
    return folder


def test_a_dual_model_needs_no_grid_that_a_pixel_shuffle_divides(run_ranks, tmp_path):
    checks = {check.name: check for check in check_folder(dual_folder(tmp_path / "dual", 15))}
    assert all(check.passed and check.applies for check in checks.values())
    assert {"outputs/G.cosine", "tensor 2/outputs/G.cosine", "pipeline 2/outputs/G.cosine"} <= (
        checks.keys()
    )


def test_a_chat_model_does_need_it():
    config = tiny_config()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_px=20))
    build("internvl_g", config)
    with pytest.raises(ConfigError, match="5x5 patch grid does not divide by 2 for the pixel sh"):
        build("chat_simple", config)


def test_pooling_heads_matter_where_there_is_a_pooling():
    config = dataclasses.replace(tiny_config(), pool_heads=3)
    build("chat_simple", config)
    with pytest.raises(ConfigError, match=r"vision\.width 20 does not divide by pool_heads 3"):
        build("internvl_c", config)


def test_a_layout_that_cannot_hold_a_model_is_told_with_its_reason(run_ranks, tmp_path):
    folder = chat_folder(tmp_path / "chat")
    result = CliRunner().invoke(app, ["parity", str(folder)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    tensor = next(line for line in lines if line.strip().startswith("tensor 2 "))
    assert "n/a" in tensor
    assert "language: key_value_heads 3 does not divide by tensor 2" in tensor
    assert lines[-1].startswith("2 of 2 pass in 1 folder(s)")
    # A number that is wrong is still missed.
    recorded = load_file(folder / "outputs.safetensors")
    recorded["logits"][0, 2, 3] += 0.01
    save_file(recorded, folder / "outputs.safetensors")
    assert CliRunner().invoke(app, ["parity", str(folder)]).exit_code == 1
