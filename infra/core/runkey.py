"""Run keys: which parameters, inputs and code a result came from.

The git commit is not part of it, or any commit would break resume; neither are layout, ranks,
threads and place, which change how fast a stage runs and not what it makes.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from vlfoundry.infra.core.config import canonical_json


def run_key(
    stage: str, parameters: Mapping[str, Any], inputs: Mapping[str, str], code: Mapping[str, Any]
) -> str:
    """Hexadecimal sha256 over a stage's parameters, input fingerprints and code.

    Args:
        inputs: path of each input -> its fingerprint.
        code: as the stage's file in artifacts/code says it (`infra.core.code.Code.stamp`).
    """
    facts = {"stage": stage, "parameters": parameters, "inputs": dict(inputs), **code}
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
