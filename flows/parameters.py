"""Whether the stages can take the parameters: asked before anything is started."""

import importlib
import re
from pathlib import Path

from infra.config import PARAMS_FILE, load_params
from infra.project import DEFINITION
from infra.stage import Stage, parameters_of

COMMAND = re.compile(r"python -m stages\.(\w+)")


def check_parameters(root: Path) -> None:
    """Build the configuration of every stage that dvc.yaml runs.

    Raises ConfigError as the stage would, minutes later.
    """
    definition = root / DEFINITION
    text = definition.read_text("utf-8") if definition.is_file() else ""
    names = dict.fromkeys(COMMAND.findall(text))
    params = load_params(root / PARAMS_FILE) if names else {}
    for name in names:
        stage: Stage = importlib.import_module(f"stages.{name}").STAGE
        parameters_of(stage, params)
