"""The entry point of `pdcoord-sidecar`: it needs no package, so that it can say which one is missing."""

import sys

from pdcoord.wire.extras import missing_package, quiet_grpc

NOT_STARTED = 2


def main() -> int:
    """Run the sidecar; the exit status is 2 if it cannot start."""
    quiet_grpc()
    try:
        from sidecar.process import main as run  # noqa: PLC0415  # needs an extra
    except ModuleNotFoundError as error:
        sys.stderr.write(missing_package("pdcoord-sidecar", error, "sidecar") + "\n")
        return NOT_STARTED
    return run()


if __name__ == "__main__":
    sys.exit(main())
