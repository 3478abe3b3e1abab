#!/usr/bin/env bash
# Writes the lock of a black-box agent: every package below its pinned ones, with its hash, without the name of a registry.
#   ops/requirements/lock-agent.sh NAME     for the version that kat_stream/env/scaffolds/agents/NAME.toml pins
set -euo pipefail
cd "$(dirname "$0")/../.."
agents=kat_stream/env/scaffolds/agents
read -r kind version node packages < <(.venv/bin/python - "$agents/$1.toml" <<'PY'
import sys
from pathlib import Path
from kat_stream.env.scaffolds.description import read_description
it = read_description(Path(sys.argv[1]))
print(it.install.kind, it.version, it.install.node or "-", *it.packages())
PY
)
if [ "$kind" = python ]; then
    tr ' ' '\n' <<<"$packages" | .venv/bin/uv pip compile -q --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --python .venv/bin/python -o "$agents/locks/$1-$version.txt" -
    exit
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python -c 'import sys; from kat_stream.env.scaffolds.install import install_node as i; print(i(sys.argv[1]))' "$node" >"$scratch/node"
home=$(cat "$scratch/node")
mkdir "$scratch/made"
# shellcheck disable=SC2086  # packages are words
PATH="$home/bin:$PATH" HOME="$scratch" "$home/bin/node" "$home/lib/node_modules/npm/bin/npm-cli.js" install --prefix "$scratch/made" \
    --package-lock-only --save-exact --omit-lockfile-registry-resolved --no-audit --no-fund --loglevel error $packages >/dev/null
.venv/bin/python - "$scratch/made/package-lock.json" "$agents/locks/$1-$version.json" <<'PY'
import json
import sys
lock = json.load(open(sys.argv[1]))
lock["name"] = lock["packages"][""]["name"] = "agent"
for package in lock["packages"].values():
    for key in ("funding", "license", "resolved", "engines"):
        package.pop(key, None)
with open(sys.argv[2], "w") as out:
    out.write(json.dumps(lock, indent=0, sort_keys=True) + "\n")
PY
