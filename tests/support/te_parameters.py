"""Prints parameters, cuts and state of all models of the "te" layer spec.

    python -m tests.support.te_parameters stand-in|te

Once on the stand-in and once on Transformer Engine itself, which wants to be told that there is a
GPU before it builds a module; on a CPU it can build, but not compute.
"""

import ctypes
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch


def load_te() -> None:
    """Import Transformer Engine where there is no GPU."""
    # Its library looks CUDA's up by name; PyTorch's packages have them in folders of their own.
    nvidia = Path(torch.__file__).parents[1] / "nvidia"
    for library in sorted(nvidia.glob("*/lib/*.so*")):
        try:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    # GPU images have them, and nothing here needs them.
    for name in ("einops", "transformer_engine.pytorch.onnx_extensions"):
        sys.modules[name] = MagicMock()
    import transformer_engine.pytorch  # noqa: F401


def main(kind: str) -> None:
    from vlfoundry.infra.backend import install

    if kind == "te":
        load_te()
        install()
        torch.cuda.is_available = lambda: True
    else:
        from tests.support import fake_transformer_engine as te_standin

        te_standin.install()
    from tests.support.tiny_models import tiny_config
    from vlfoundry.infra.backend import Layout
    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.models.internvl.config import PARTS
    from vlfoundry.models.internvl.model import build

    with parallel(Layout()):
        for name in PARTS:
            model = build(name, tiny_config(), spec="te")
            for parameter, tensor in model.named_parameters():
                cut = getattr(tensor, "tensor_model_parallel", False)
                facts = (tuple(tensor.shape), cut, cut and tensor.partition_dim)
                print(name, parameter, *facts)
            print(name, sorted(model.sharded_state_dict()), sorted(model.state_dict()))


if __name__ == "__main__":
    main(sys.argv[1])
