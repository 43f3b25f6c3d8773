"""Figures derived from a policy."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.model import Model
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side


def pool(block_tokens: int | None) -> Pool:
    layout = KvLayout(block_tokens) if block_tokens is not None else None
    side = Side(Connector.PDCOORD, layout)
    speed = SpeedFigures(0.01, 1e-4, 0.01)
    return Pool(PoolName("p"), ModelName("m"), Role.BOTH, "v", EngineKind.VLLM, side, speed, 1, 1e9)


def test_the_largest_block_of_any_pool_counts() -> None:
    assert Model(ModelName("m"), (pool(16), pool(128), pool(None))).block_tokens_max == 128


def test_with_no_layout_known_a_block_is_one_token() -> None:
    assert Model(ModelName("m"), ()).block_tokens_max == 1
    assert Model(ModelName("m"), (pool(None),)).block_tokens_max == 1


@given(st.integers(1, 4096), st.floats(0.01, 16.0))
def test_an_index_block_has_at_least_one_byte(tokens: int, bytes_per_token: float) -> None:
    model = Model(ModelName("m"), (), prefix_block_tokens=tokens, bytes_per_token=bytes_per_token)
    assert model.prefix_block_bytes == max(1, round(tokens * bytes_per_token))
