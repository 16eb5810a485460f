"""The official InternViT's numbers, with the official weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.internvit.hf import config_from_official, from_official
from vlfoundry.models.internvit.model import InternViT

FOLDER = Path(__file__).parent / "golden"


def test_internvit_matches_the_official_forward():
    config = config_from_official(json.loads((FOLDER / "internvit.json").read_text()))
    tensors = load_file(FOLDER / "internvit.safetensors")
    image = tensors.pop("test.pixel_values")
    expected = tensors.pop("test.last_hidden_state")
    model = InternViT(config).eval()
    load_weights(model, from_official(tensors, config))

    with torch.no_grad():
        got = model(image)
        states = model.hidden_states(image)

    assert (got - expected).abs().max() < 1e-4
    assert len(states) == config.depth + 1
    assert torch.equal(states[-1], got)
    assert torch.equal(model(image, hidden_state=-3), states[-3])
