"""deploy/kind: the scripts are sound shell, and would do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["deploy/kind/up", "deploy/kind/down", "deploy/images/vllm"]
UP = """\
kind create cluster --name pdcoord --config deploy/kind/cluster.yaml --wait 120s
docker build --file deploy/images/Dockerfile --target gateway --tag pdcoord/gateway:kind .
docker build --file deploy/images/Dockerfile --target sidecar --tag pdcoord/sidecar:kind .
docker build --file deploy/images/Dockerfile --target emulator --tag pdcoord/emulator:kind .
docker build --file deploy/images/Dockerfile --target transfer --tag pdcoord/transfer:kind .
kind load docker-image --name pdcoord pdcoord/gateway:kind pdcoord/sidecar:kind pdcoord/emulator:kind \
pdcoord/transfer:kind
helm --kube-context kind-pdcoord upgrade --install pdcoord deploy/charts/pdcoord --namespace pdcoord \
--create-namespace --set pd.enabled=true --values deploy/kind/values.yaml --wait --timeout 5m
kubectl --context kind-pdcoord --namespace pdcoord rollout status deployment/pdcoord --timeout 5m
kubectl --context kind-pdcoord --namespace pdcoord rollout status deployment/pdcoord-gaudi-prefill \
--timeout 5m
kubectl --context kind-pdcoord --namespace pdcoord rollout status deployment/pdcoord-nvidia-both --timeout 5m
kubectl --context kind-pdcoord --namespace pdcoord rollout status deployment/pdcoord-amd-decode --timeout 5m
kubectl --context kind-pdcoord --namespace pdcoord port-forward pod/COORDINATOR 8080:8080 &
curl --fail-with-body -sS -D - -H x-request-id:\\ kind-demo -d @PROMPT http://127.0.0.1:8080/v1/completions
kubectl --context kind-pdcoord --namespace pdcoord exec pod/COORDINATOR -- pdcoord explain kind-demo
kubectl --context kind-pdcoord --namespace pdcoord exec pod/COORDINATOR -- pdcoord paths
"""


def dry_run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [str(ROOT / script)],
        env={"PATH": os.environ["PATH"], "UP_DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return "".join(
        line for line in done.stdout.splitlines(keepends=True) if line.strip() and line[:2] != "=="
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck, "shellcheck is not installed; make venv"
    done = subprocess.run(
        [shellcheck, script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert os.access(ROOT / script, os.X_OK)


def test_what_up_would_do() -> None:
    assert dry_run("deploy/kind/up") == UP


def test_settings_reach_the_commands() -> None:
    shown = dry_run("deploy/kind/up", CLUSTER="lab", NAMESPACE="llm", LOCAL_PORT="9999", WAIT="1m")
    assert "kind create cluster --name lab " in shown
    assert "--context kind-lab --namespace llm port-forward pod/COORDINATOR 9999:8080" in shown
    assert "pdcoord --namespace" not in shown.replace("charts/pdcoord --namespace", "")
    assert "5m" not in shown


def test_down_removes_what_up_made() -> None:
    shown = dry_run("deploy/kind/down").splitlines()
    built = re.findall(r"--tag (\S+)", UP)
    assert shown == ["kind delete cluster --name pdcoord", f"docker image rm --force {' '.join(built)}"]


def test_up_says_what_to_install(tmp_path: Path) -> None:
    for name in ("dirname", "bash", "env"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [str(tmp_path / "bash"), str(ROOT / "deploy/kind/up")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    for name in ("docker", "kind", "kubectl", "helm", "curl"):
        assert f"deploy/kind/up needs {name}: install " in done.stderr


def test_deployments_and_images_are_those_of_the_values() -> None:
    values = yaml.safe_load((ROOT / "deploy/kind/values.yaml").read_text())
    pools = {f"pdcoord-{pool['name']}" for pool in values["models"][0]["pools"]}
    assert set(re.findall(r"deployment/(\S+)", UP)) == pools | {"pdcoord"}
    images = [values[part]["image"] for part in ("coordinator", "sidecar", "transfer")]
    images += [vendor["image"] for vendor in values["vendors"].values()]
    assert {f"{image['repository']}:{image['tag']}" for image in images} == set(
        re.findall(r"--tag (\S+)", UP)
    )
