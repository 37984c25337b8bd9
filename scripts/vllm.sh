#!/bin/sh
# Makes an environment of its own for vLLM, which pins older libraries than Sluicegate, and serves
# a model from it on the CPU. For Linux on x86_64.
#
#   scripts/vllm.sh install             makes .venv-vllm
#   scripts/vllm.sh serve DIR [PORT]    serves the model in DIR on 127.0.0.1:8000 (or PORT)
#
# VLLM_VENV   another place for the environment
# PYTHON      the Python that makes it, 3.11 or newer (python3)
# TORCH       what pip is given for torch. On a machine without its own CPU build, name PyTorch's
#             CPU index: TORCH="torch==2.13.0 --index-url URL"
# MODEL_NAME  the name that clients ask for (smollm2-135m-instruct)
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VLLM_VENV:-$root/.venv-vllm}
python=$venv/bin/python
installed=$venv/.installed

usage() {
    echo "usage: $0 install | serve DIR [PORT]" >&2
    exit 2
}

fail() {
    echo "$0: $1" >&2
    exit 1
}

install() {
    "${PYTHON:-python3}" -m venv "$venv"
    # The list is whole but for torch, and for torchvision, torchaudio and torchcodec, which want
    # CUDA and which text does not need. So pip is kept from adding what vLLM's metadata names.
    "$python" -m pip install --no-deps --require-hashes -r "$root/constraints/vllm.txt"
    # shellcheck disable=SC2086  # TORCH may hold options for pip
    "$python" -m pip install ${TORCH:-torch==2.13.0}
    touch "$installed"
}

serve() {
    [ -e "$installed" ] || fail "vLLM is not installed in $venv: run '$0 install'."
    [ -f "$1/config.json" ] || fail "$1 holds no model: make one with 'sluicegate upstream demo --output $1'."
    # One GiB holds the keys and values of about 45,000 tokens of the demonstration model.
    VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
        exec "$python" -m vllm.entrypoints.openai.api_server \
        --model "$1" --served-model-name "${MODEL_NAME:-smollm2-135m-instruct}" \
        --enforce-eager --max-model-len 1024 --host 127.0.0.1 --port "${2:-8000}"
}

case ${1:-} in
    install)
        [ $# -eq 1 ] || usage
        install
        ;;
    serve)
        { [ $# -ge 2 ] && [ $# -le 3 ]; } || usage
        serve "$2" "${3:-8000}"
        ;;
    *) usage ;;
esac
