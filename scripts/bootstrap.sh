#!/usr/bin/env bash
# Makes .venv from a lock file, every file checked against its hash, and installs the project
# into it without touching the lock. Does nothing, in milliseconds, when nothing changed.
#
#   scripts/bootstrap.sh [lock]      lock: dev (default), core, gpu or bench
#
# Needs a Python 3.12 (on the PATH or under pyenv; else uv fetches one) and, where uv is not
# on the PATH, any Python 3.8 or newer that has pip, to install uv with.
set -euo pipefail
cd "$(dirname "$0")/.."
lock_name=${1:-dev}
lock=requirements/$lock_name.lock
stamp=.venv/.vlfoundry-stamp

say() { printf '[bootstrap] %s\n' "$*" >&2; }
die() { printf '[bootstrap] error: %s\n' "$*" >&2; exit 2; }

[ -f "$lock" ] || die "no lock file $lock; there are: $(cd requirements && echo *.lock)"

# The stamp holds the checkout's place too: an environment that was copied is made again.
wanted=$( (pwd; cat "$lock" pyproject.toml scripts/bootstrap.sh) | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

# A name on the PATH proves nothing: a pyenv shim exists for versions that are not active.
is_python_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

find_python_312() {
    local candidate
    for candidate in python3.12 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
        if is_python_312 "$candidate"; then command -v "$candidate"; return; fi
    done
}

# With pip: the first python on the PATH is often .venv's, which has none.
find_any_python() {
    local candidate
    for candidate in "$1" python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys, importlib.util as u; sys.exit(sys.version_info < (3, 8) or not u.find_spec("pip"))' 2>/dev/null; then
            command -v "$candidate"; return
        fi
    done
}

find_uv() {
    local candidate
    for candidate in "${UV:-}" uv .cache/uv/bin/uv; do
        [ -n "$candidate" ] || continue
        if "$candidate" --version >/dev/null 2>&1; then command -v "$candidate"; return; fi
    done
}

install_uv() {
    local base
    base=$(find_any_python "$1")
    [ -n "$base" ] || die "no uv on the PATH and no Python with pip to install it; install either"
    say "uv is not on the PATH: installing it into .cache/uv"
    PIP_ROOT_USER_ACTION=ignore "$base" -m pip install --quiet --disable-pip-version-check --require-hashes \
        --no-warn-script-location --target .cache/uv -r requirements/bootstrap.lock >&2 ||
        die "pip could not install uv; check the network, or put uv on the PATH"
}

python=$(find_python_312)
uv=$(find_uv)
if [ -z "$uv" ]; then
    install_uv "$python"
    uv=$(find_uv)
    [ -n "$uv" ] || die "uv was installed into .cache/uv but does not run"
fi

if ! { [ -x .venv/bin/python ] && is_python_312 .venv/bin/python; }; then
    say "making .venv with ${python:-a Python 3.12 that uv fetches}"
    "$uv" venv --quiet --allow-existing --python "${python:-3.12}" .venv
fi
rm -f "$stamp"
say "installing $lock"
# Compiled once here: where PYTHONDONTWRITEBYTECODE is set, every stage would compile torch anew.
"$uv" pip sync --quiet --compile-bytecode --python .venv/bin/python --require-hashes "$lock"
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
echo "$wanted" >"$stamp"
say "ready: $(.venv/bin/python --version), $lock"
