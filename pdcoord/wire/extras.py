"""What an entry point does before it imports the rest: says which extra is missing, and keeps gRPC quiet."""

import os
from collections.abc import MutableMapping

OWN = frozenset({"pdcoord", "sidecar", "transfer"})
_EXTRAS = {
    "aiohttp": "kubernetes",
    "cryptography": "extproc",
    "envoy": "extproc",
    "grpc_health": "extproc",
    "kubernetes": "kubernetes",
    "matplotlib": "study",
    "numpy": "transfer",
    "opentelemetry": "tracing",
    "scipy": "study",
}


def missing_package(command: str, error: ModuleNotFoundError, extra: str) -> str:
    """One line naming a package that is not installed and the extra that brings it.

    Args:
        extra: of the command itself, for a package that no extra of its own is for.

    Raises:
        ModuleNotFoundError: the error itself, if a module of ours is missing: that is a defect.
    """
    package = (error.name or "").partition(".")[0]
    if not package or package in OWN:
        raise error
    return f"{command} needs {error.name}: pip install 'pdcoord[{_EXTRAS.get(package, extra)}]'"


def quiet_grpc(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep gRPC's own lines from between our JSON lines; heeded only before grpc is imported."""
    environment.setdefault("GRPC_VERBOSITY", "NONE")
