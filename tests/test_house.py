"""The repository as a whole: names, layers, files."""

import importlib.metadata
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "vlfoundry"
MIB = 1 << 20


def test_no_other_installed_distribution_owns_our_package_name() -> None:
    owners = importlib.metadata.packages_distributions()
    assert set(owners.get(PACKAGE, [])) <= {PACKAGE}


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_the_repository_stays_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 30 * MIB
    assert not [path for path, size in sizes.items() if size > 5 * MIB]


def test_locks_hold_hashes_and_no_addresses() -> None:
    for lock in sorted((ROOT / "requirements").glob("*.lock")):
        text = lock.read_text("utf-8")
        pinned = [line for line in text.splitlines() if "==" in line and line[0].isalnum()]
        assert pinned, lock
        assert "://" not in text, lock
        assert text.count("--hash=sha256:") >= len(pinned), lock


def test_every_shell_script_parses() -> None:
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(script)], check=True)
