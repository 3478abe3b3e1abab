#!/usr/bin/env bash
# Makes .venv with everything this checkout needs, from package registries only; does nothing if it is up to date.
#   ops/setup.sh run     what `make demo` needs
#   ops/setup.sh test    also what the tests need: dev tools, a JVM and Maven for Kafka, the agents' CLIs
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-run}
requirements=ops/requirements/$what.txt
oracles=ops/requirements/oracles.txt
stamp=.venv/.kat-$what-$(cat "$requirements" "$oracles" pyproject.toml ops/setup.sh | sha256sum | cut -c1-16)
export UV_PYTHON_DOWNLOADS=never

say() { printf 'setup: %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

# Debian packages, only those whose command is missing; the demo runs without them, less isolated.
need() {
    local command=$1 package=$2
    command -v "$command" >/dev/null && return 0
    if command -v apt-get >/dev/null && as_root env DEBIAN_FRONTEND=noninteractive sh -c "
        apt-get install -y -qq --no-install-recommends $package >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends $package >/dev/null; }"; then
        say "installed $package"
    else
        say "warning: no \`$command\`; install the package $package to get it"
    fi
}

# promtool out of Debian's package: to install all of it would start a Prometheus on this machine.
need_promtool() {
    command -v promtool >/dev/null && return 0
    local folder
    folder=$(mktemp -d)
    if (cd "$folder" &&
        { apt-get download -qq prometheus || { as_root apt-get update -qq && apt-get download -qq prometheus; }; } &&
        dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool &&
        as_root install usr/bin/promtool /usr/local/bin) 2>/dev/null; then
        say "installed promtool"
    else
        say "warning: no \`promtool\`; the package prometheus has it"
    fi
    rm -rf "$folder"
}

need git git
need bwrap bubblewrap
if [ "$what" = test ] || [ "${LOG:-}" = kafka ]; then
    need java default-jre-headless
    need mvn maven
fi
if [ "$what" = test ]; then
    need ip iproute2
    need_promtool
fi

if [ ! -e "$stamp" ]; then
    python=$(command -v python3.12 || command -v python3)
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || {
        say "Python 3.12 or newer is needed; $python is $("$python" --version)"; exit 1; }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    say "installing $(grep -c '==' "$requirements") pinned packages into .venv"
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r ops/requirements/uv.txt
    # Byte code now: where Python may not write it (PYTHONDONTWRITEBYTECODE, as in many images), each of a run's
    # processes would compile torch and transformers again, 6 s of CPU at every start.
    .venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python --require-hashes -r "$requirements"
    .venv/bin/uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
    if [ "$what" = test ]; then  # only their source is read, so nobody imports from there: verl brings a package `tests`
        .venv/bin/uv pip install -q --python .venv/bin/python --target .venv/oracles --no-deps --require-hashes -r "$oracles"
    fi
    rm -f .venv/.kat-"$what"-*
    touch "$stamp"
fi

if [ "$what" = test ]; then
    # One agent of each wire; the tests run whatever else is installed, too.
    .venv/bin/kat-stream scaffolds install mini-swe-agent codex claude-code gemini-cli qwen-code | while read -r line; do
        say "$line"
    done
fi
