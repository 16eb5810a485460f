"""Training goes on from a model with an official tokenizer: its ids, its template, its files."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.official_text import ROWS, write_template, write_tokenizer
from tests.support.tiny_project import PARAMS, make_project, run_stage
from vlfoundry.infra.core.config import build as build_config

pytestmark = pytest.mark.slow

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
STAGES = {
    "contrastive": ("contrastive",),
    "generative": ("generative",),
    "sft/simple": ("sft", "variant=simple"),
    "sft/full": ("sft", "variant=full"),
}


def parameters() -> dict:
    params = copy.deepcopy(PARAMS)
    params["model"]["text"]["vocab_size"] = ROWS
    for train in (
        params["contrastive"]["train"], params["generative"]["train"],
        *params["sft"]["train"].values(),
    ):  # fmt: skip
        train |= {"steps": 2, "save_every_steps": 2}
    params["sft"]["sources"] = {"scenes": {"weight": 1.0}, "talk": {"weight": 1.0}}
    return params


def save_start(root: Path, params: dict, tokenizer: str, template: str) -> Path:
    """A text model with an official tokenizer, where stage 1 takes its text tower from."""
    from vlfoundry.models.chat.official import official_tokenizer
    from vlfoundry.models.internvl.config import InternVLConfig
    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.internvl.predict import save_model

    write_tokenizer(root / "published", tokenizer)
    write_template(root / "published", template)
    config = build_config(InternVLConfig, params["model"])
    folder = root / "artifacts/pretrain_text/model"
    official = official_tokenizer(root / "published", embeds=True)
    save_model(folder, "text", config, build("text", config), official)
    return folder


@pytest.mark.parametrize(
    ("tokenizer", "template", "folders"),
    [
        ("internlm2", "internlm2-chat", tuple(STAGES)),
        ("llama_bos", "vicuna_v1", ("contrastive", "sft/simple")),  # pictures have their own id
    ],
)
def test_stages_go_on_with_an_official_tokenizer(tokenizer, template, folders, warm, tmp_path):
    from vlfoundry.models.internvl.predict import load_model

    params = parameters()
    root = make_project(tmp_path / "project", params)
    Image.fromarray(np.full((32, 64, 3), 90, np.uint8)).save(root / "data/chat/a.png")
    line = json.dumps({"image": "a.png", "conversations": TALK})
    (root / "data/chat/talk.jsonl").write_text(line + "\n")
    start = save_start(root, params, tokenizer, template)
    files = {path.name: path.read_bytes() for path in (start / "official").iterdir()}
    assert "tokenizer.model" in files

    for folder in folders:
        run_stage(root, *STAGES[folder])
        made = root / "artifacts" / folder / "model"
        assert {p.name: p.read_bytes() for p in (made / "official").iterdir()} == files, folder
        assert not (made / "tokenizer.json").exists()
        model = load_model(made)
        if "embed" in model.capabilities:
            assert np.isfinite(model.embed_texts(["a red apple"])).all()
        if "generate" in model.capabilities:
            picture = np.full((1, 32, 32, 3), 90, np.uint8)
            assert len(model.generate(picture, ["What is it?"], 3)) == 1
