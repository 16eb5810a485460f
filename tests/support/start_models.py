"""Model folders that have a config and names and shapes, and weights that are all zero."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.tiny_project import PARAMS
from vlfoundry.infra.core.config import build
from vlfoundry.models.estimate.weights import weights
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.folder import write_config

CONFIG: InternVLConfig = build(InternVLConfig, PARAMS["model"])


def make_folder(
    folder: Path, kind: str, config: InternVLConfig = CONFIG, without: str | None = None
) -> Path:
    """A model folder of a kind, maybe without the weights whose names begin with `without`."""
    write_config(folder, kind, config)
    tensors = {
        weight.name: np.zeros(weight.shape, np.float32)
        for weight in weights(kind, config)
        if without is None or not weight.name.startswith(without)
    }
    save_file(tensors, folder / "weights.safetensors")
    return folder
