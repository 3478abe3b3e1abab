#!/usr/bin/env bash
# Pins what pyproject.toml asks for, with hashes and without any registry's address. Run it after changing dependencies.
set -euo pipefail
cd "$(dirname "$0")/../.."
compile() {
    local out=$1; shift
    .venv/bin/uv pip compile -q "$@" --generate-hashes --no-header --no-annotate --no-emit-index-url \
        --python-version 3.12 -o "ops/requirements/$out.txt"
}
printf 'hatchling\neditables\ntorch==2.13.0\n' > .venv/build.in
echo 'uv==0.13.9' > .venv/uv.in
printf 'agilerl==2.58.0\nverl==0.9.1\n' > .venv/oracles.in
compile run pyproject.toml .venv/build.in --extra train --extra archive --extra ui
compile test pyproject.toml .venv/build.in --extra train --extra archive --extra ui --extra s3 --extra megatron --extra dev
compile uv .venv/uv.in
compile oracles .venv/oracles.in --no-deps
