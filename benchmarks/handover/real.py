"""The pair of real engines: two vLLM servers on CPU with our connector and unlike block sizes."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.handover.fleets import (
    HOST,
    ROOT,
    VLLM_PYTHON,
    Pair,
    StartError,
    running,
    sidecar,
    wait_ready,
)
from pdcoord.sim.ports import free_ports

MODEL = "tiny"
PREFILL_BLOCK_TOKENS = 32
DECODE_BLOCK_TOKENS = 128
CHUNK_TOKENS = 512
# As tests/e2e runs its engines, and why.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "UCX_TLS": "tcp,self,sm",
    "PYTHONPATH": str(ROOT),
}


@contextmanager
def vllm(folder: Path) -> Iterator[Pair]:
    """Two servers of one tiny random model.

    Raises:
        StartError: if the engines' environment is not there, or one does not serve.
    """
    if not VLLM_PYTHON.exists():
        raise StartError(f"{VLLM_PYTHON} does not exist: run tests/e2e/setup.sh first")
    model = folder / "model"
    with ExitStack() as stack:
        made = stack.enter_context(
            running("model", [VLLM_PYTHON, ROOT / "tests/e2e/tiny_model.py", model], folder, ENVIRONMENT)
        )
        if made.process.wait(120.0):
            raise StartError(f"the model could not be made:\n{made.log.read_text(errors='replace')[-2_000:]}")
        ports = free_ports(4)
        prefill, decode = f"{HOST}:{ports[0]}", f"{HOST}:{ports[1]}"
        engines = []
        for name, port, kv_port, block_tokens in (
            ("prefill", ports[0], ports[2], PREFILL_BLOCK_TOKENS),
            ("decode", ports[1], ports[3], DECODE_BLOCK_TOKENS),
        ):
            command = [VLLM_PYTHON, ROOT / "tests/e2e/engine.py", *_flags(model, port, kv_port, block_tokens)]
            engines.append(stack.enter_context(running(name, command, folder, {**os.environ, **ENVIRONMENT})))
        for started, address in zip(engines, (prefill, decode), strict=True):
            wait_ready(started, address, "/health")
        address = stack.enter_context(sidecar(folder, prefill, ports[2], decode))
        yield Pair(MODEL, prefill, decode, address, ports[2], "vllm:pdcoord_load_seconds_sum")


def _flags(model: Path, port: int, kv_port: int, block_tokens: int) -> list[str]:
    connector = {
        "kv_connector": "PdcoordConnector",
        "kv_connector_module_path": "transfer.engines.vllm.connector",
        "kv_role": "kv_both",
        "kv_port": kv_port,
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"advertise_host": HOST, "staging_bytes": 256 << 20},
    }
    return [
        *("--model", str(model), "--served-model-name", MODEL, "--host", HOST, "--port", str(port)),
        *("--max-model-len", "8192", "--block-size", str(block_tokens), "--dtype", "bfloat16"),
        *("--max-num-batched-tokens", str(CHUNK_TOKENS), "--enforce-eager", "--no-enable-prefix-caching"),
        *("--kv-transfer-config", json.dumps(connector)),
    ]
