"""The entry point of `pdcoord`: it needs no package, so that it can say which one is missing."""

import sys

from pdcoord.wire.extras import missing_package, quiet_grpc

NOT_STARTED = 2


def main() -> int:
    """Run a command; the exit status is 2 for one that cannot start."""
    quiet_grpc()
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["preflight"]:
            # It looks for what is missing, so it asks for nothing itself.
            from transfer.preflight import main as preflight  # noqa: PLC0415  # imported where it is run

            return preflight(arguments[1:])
        from pdcoord.commands import app  # noqa: PLC0415  # needs an extra

        app()
    except ModuleNotFoundError as error:
        command = " ".join(["pdcoord", *(word for word in arguments[:1] if not word.startswith("-"))])
        sys.stderr.write(missing_package(command, error, "gateway") + "\n")
        return NOT_STARTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
