"""The producer's process: does what the measuring process says, line by line."""

import base64
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.transfer.engines import BareNixl, Hand, Side
from transfer.layout import KvDtype, KvLayout, KvSplit, Order


def layout_of(fields: dict[str, Any]) -> KvLayout:
    return KvLayout(
        **{
            **fields,
            "order": Order(fields["order"]),
            "dtype": KvDtype(fields["dtype"]),
            "split": KvSplit(fields["split"]),
        }
    )


def main() -> int:
    # Libraries write to standard output what is not for the measuring process.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    side = Side(
        layout_of(settings["layout"]), settings["backend"], settings["token_count"], settings["staging_bytes"]
    )
    bare: BareNixl | None = None
    print(json.dumps({"address": side.agent.address}), file=answers, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        told: dict[str, Any] = {}
        match ask["do"]:
            case "open":
                told = asdict(side.open(ask["token_count"]))
            case "stage":
                told = {"took_s": side.stage(Hand(**ask["hand"]))}
            case "bare":
                bare = bare or BareNixl("bare-producer", ask["length_bytes"])
                metadata, address = bare.told()
                told = {"metadata": base64.b64encode(metadata).decode(), "address": address}
            case "stats":
                stats = side.agent.stats()
                told = {"used_bytes": stats.staging_used_bytes, "packed_bytes": stats.packed_bytes}
            case _:
                break
        print(json.dumps(told), file=answers, flush=True)
    side.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
