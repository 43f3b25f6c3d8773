"""The other projects' routers, in an environment of their own."""

import subprocess
import sys

from benchmarks.relay.contenders import PEER_ENVIRONMENT

# vllm-router imports setproctitle without declaring it.
REQUIREMENTS = ("sglang-router==0.3.2", "vllm-router==0.1.17", "setproctitle>=1.3")
_INSTALL_S_MAX = 600.0


def ensure_installed() -> None:
    """Make the environment if it is not there or is not complete; takes about a minute the first time.

    Raises:
        subprocess.CalledProcessError: if a package cannot be installed; its output went to stderr.
    """
    python = PEER_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run(
            [sys.executable, "-m", "venv", str(PEER_ENVIRONMENT)], check=True, timeout=_INSTALL_S_MAX
        )
    commands = [PEER_ENVIRONMENT / "bin" / name for name in ("sglang-router", "vllm-router")]
    if not all(command.exists() for command in commands):
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *REQUIREMENTS,
        ]
        subprocess.run(install, check=True, timeout=_INSTALL_S_MAX, stdout=sys.stderr)
