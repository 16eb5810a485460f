"""The Transformer Engine layer spec, in processes of its own.

Megatron settles when it is imported whether there is Transformer Engine, and every other test
needs it to be absent.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT.parent / "shared" / "gpu" / "te_env.tar.xz"


def run_python(*arguments: str, **environment: str) -> str:
    """Output of a Python process in the repository; fails with it if the process fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def test_it_equals_the_local_spec_on_the_stand_in():
    """Names, checkpoints, losses, gradients and FP8's choices: see `tests/support/te_cases.py`."""
    output = run_python(
        "-m", "pytest", "-p", "tests.support.fake_transformer_engine", "tests/support/te_cases.py"
    )
    assert " passed" in output
    assert "skipped" not in output


@pytest.fixture(scope="module")
def te_site(tmp_path_factory) -> str:
    """Where Transformer Engine is; its bundle for GPU machines may lie beside the checkout."""
    site = os.environ.get("VLFOUNDRY_TE_SITE")
    if not site and not BUNDLE.is_file():
        pytest.skip("NOT RUN: no Transformer Engine; set VLFOUNDRY_TE_SITE to where it is unpacked")
    if not site:
        site = str(tmp_path_factory.mktemp("te"))
        with tarfile.open(BUNDLE) as bundle:
            bundle.extractall(site, filter="fully_trusted")
    return os.pathsep.join([str(ROOT), site])


@pytest.fixture(scope="module")
def installed(te_site, tmp_path_factory) -> list[str]:
    """What Transformer Engine's own modules print, and then its optimizer: in one process."""
    code = (
        "import sys; from tests.support import te_parameters; te_parameters.main('te');"
        "from tests.support import te_masters; te_masters.main(sys.argv[1])"
    )
    folder = str(tmp_path_factory.mktemp("masters"))
    return run_python("-c", code, folder, PYTHONPATH=te_site).splitlines()


def test_the_stand_in_has_the_parameters_of_the_installed_one(installed):
    lines = run_python("-m", "tests.support.te_parameters", "stand-in").splitlines()
    assert installed[:-2] == lines
    assert "linear_qkv" in str(lines)


def test_the_installed_optimizer_comes_back_from_a_checkpoint(installed):
    """With moments in bf16, masters as remainders, and buffers that are fp32."""
    types, verdict = installed[-2:]
    assert "('exp_avg', 'torch.bfloat16')" in types
    assert "('master_param', 'torch.int16')" in types
    assert verdict == "as it was"
