"""Processes that were told to trace and cannot say so in one line and do not start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "deploy" / "policies" / "two-vendor.yaml"
COMMANDS = {
    "gateway": ["pdcoord.cli", "serve", "--policy", str(POLICY), "--port", "0", "--admin-port", "0"],
    "sidecar": ["sidecar.main", "--port", "0", "--metrics-port", "0"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_tracing_that_cannot_be_had_is_one_line_and_status_2(name: str) -> None:
    module, *arguments = COMMANDS[name]
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc', expected 'http/protobuf'" in line
