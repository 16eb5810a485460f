"""Whether the stages can take the parameters: asked before anything is started."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.config import PARAMS_FILE, load_params
from infra.launch import local_profile
from infra.project import DEFINITION
from infra.stage import Stage, parameters_of
from infra.streams import check_seed

COMMAND = re.compile(r"python -m stages\.(\w+)")


def check_parameters(root: Path, params: Mapping[str, Any] | None = None) -> None:
    """Build the configuration of every stage that dvc.yaml runs, and the launcher's.

    Args:
        root: the project.
        params: of the run; None: those of params.yaml.

    Raises:
        ConfigError: as the stage would raise it, hours later.
    """
    definition = root / DEFINITION
    text = definition.read_text("utf-8") if definition.is_file() else ""
    names = dict.fromkeys(COMMAND.findall(text))
    if not names:
        return
    local_profile()
    params = load_params(root / PARAMS_FILE) if params is None else params
    for name in names:
        stage: Stage = importlib.import_module(f"stages.{name}").STAGE
        parameters_of(stage, dict(params))
    check_seed(params["seed"])
