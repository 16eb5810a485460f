#!/usr/bin/env bash
# Resolves requirements/*.lock from pyproject.toml, for every platform, with hashes.
# Versions that are locked and still fit stay; `scripts/lock.sh --upgrade` takes the newest.
# dev is resolved first and binds the others, so that a test and a GPU run use the same versions.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .cache/uv/bin/uv)

compile() {
    local name=$1
    shift
    "$uv" pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
        --python-version 3.12 --output-file "requirements/$name.lock" "$@"
    echo "requirements/$name.lock: $(grep -c '^[a-z0-9].*==' "requirements/$name.lock") packages"
}

echo uv | compile bootstrap "$@" -
compile dev "$@" --extra dev pyproject.toml
compile core --constraint requirements/dev.lock pyproject.toml
compile gpu --constraint requirements/dev.lock --extra dev --extra gpu pyproject.toml
compile bench --constraint requirements/dev.lock --extra dev --extra bench pyproject.toml
