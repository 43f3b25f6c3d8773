"""How a pool's layout is named for people."""

from dataclasses import replace

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.pathview import layout_words
from transfer.layout import KvLayout
from transfer.presets import PRESETS
from transfer.verdict import Connector, Side

POOL = Pool(
    PoolName("p"),
    ModelName("m"),
    Role.PREFILL,
    "amd",
    EngineKind.VLLM,
    Side(Connector.PDCOORD, None),
    SpeedFigures(0.01, 1e-4, 0.01),
    1_000,
    1e10,
)


def test_a_layout_is_named_by_vendor_connector_preset_and_keys() -> None:
    assert layout_words(POOL) == "amd pdcoord: layout unknown"
    for name, preset in PRESETS.items():
        words = layout_words(replace(POOL, side=Side(Connector.PDCOORD, preset.layout)))
        head, _, keys = words.partition(": ")
        assert name in head.split()[-1].split("|")
        assert f"block_tokens={preset.layout.block_tokens} order={preset.layout.order}" in keys


def test_a_layout_of_no_preset_has_its_keys_only() -> None:
    words = layout_words(replace(POOL, side=Side(Connector.NIXL, KvLayout(48))))
    assert words.startswith("amd nixl: block_tokens=48 order=NHD dtype=bfloat16 tensor_parallel=1")
