"""What of prompts is in use: as much as the longest beginning that somebody under way shares, and no more."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import ModelName
from pdcoord.core.inuse import STRIDE_BLOCKS, PromptsInUse
from pdcoord.core.request import BlockKey, Request, RequestId

BLOCK_TOKENS = 16
STRIDE_TOKENS = STRIDE_BLOCKS * BLOCK_TOKENS


def request(name: str, keys: Sequence[int]) -> Request:
    return Request(
        RequestId(name),
        ModelName("m"),
        prompt_tokens=len(keys) * BLOCK_TOKENS + 5,
        block_keys=tuple(BlockKey(key) for key in keys),
        block_tokens=BLOCK_TOKENS,
    )


def chain(*parts: tuple[int, int]) -> list[int]:
    """Keys of a prompt made of parts, each of a text and a count of blocks; equal beginnings, equal keys."""
    keys: list[int] = []
    for text, count in parts:
        for _ in range(count):
            keys.append(hash((text, tuple(keys[-1:]), len(keys))))
    return keys


def test_what_a_request_holds_is_shared_by_the_next_with_its_beginning() -> None:
    in_use = PromptsInUse()
    in_use.hold(3, request("one", chain((1, 40), (2, 10))))
    other = request("other", chain((1, 40), (3, 10)))
    assert in_use.shared_tokens(3, other, 40 * BLOCK_TOKENS) == 40 * BLOCK_TOKENS
    # Less is cached than is in use, as far as is known.
    assert in_use.shared_tokens(3, other, 20 * BLOCK_TOKENS) == 2 * STRIDE_TOKENS
    assert in_use.shared_tokens(4, other, 40 * BLOCK_TOKENS) == 0


def test_with_its_last_holder_a_beginning_is_let_go() -> None:
    in_use = PromptsInUse()
    keys = chain((1, 16))
    in_use.hold(0, request("one", keys))
    in_use.hold(0, request("two", keys))
    in_use.let_go(RequestId("one"))
    assert in_use.shared_tokens(0, request("x", keys), 16 * BLOCK_TOKENS) == 16 * BLOCK_TOKENS
    in_use.rename(RequestId("two"), RequestId("three"))
    in_use.let_go(RequestId("two"))
    assert in_use.shared_tokens(0, request("x", keys), 16 * BLOCK_TOKENS) == 16 * BLOCK_TOKENS
    in_use.let_go(RequestId("three"))
    assert in_use.shared_tokens(0, request("x", keys), 16 * BLOCK_TOKENS) == 0
    in_use.validate(set())


def test_what_a_gone_endpoint_held_is_not_held_by_the_next_of_its_ordinal() -> None:
    in_use = PromptsInUse()
    keys = chain((1, 16))
    in_use.hold(0, request("one", keys))
    in_use.hold(1, request("two", keys))
    in_use.forget(0)
    assert in_use.shared_tokens(0, request("x", keys), 16 * BLOCK_TOKENS) == 0
    assert in_use.shared_tokens(1, request("x", keys), 16 * BLOCK_TOKENS) == 16 * BLOCK_TOKENS
    in_use.hold(0, request("three", keys))
    in_use.let_go(RequestId("one"))
    assert in_use.shared_tokens(0, request("x", keys), 16 * BLOCK_TOKENS) == 16 * BLOCK_TOKENS
    in_use.validate({RequestId("two"), RequestId("three")})


def test_a_repeated_prompt_shares_all_but_its_last_token() -> None:
    in_use = PromptsInUse()
    asked = replace(request("one", chain((1, 16))), prompt_tokens=16 * BLOCK_TOKENS)
    in_use.hold(0, asked)
    assert in_use.shared_tokens(0, asked, 16 * BLOCK_TOKENS - 1) == 16 * BLOCK_TOKENS - 1


def test_where_tokens_are_denser_than_blocks_say_they_are_shared_all_the_same() -> None:
    in_use = PromptsInUse()
    asked = replace(request("one", chain((1, 80))), prompt_tokens=80 * 2 * BLOCK_TOKENS + 1)
    in_use.hold(0, asked)
    cached_tokens = 80 * 2 * BLOCK_TOKENS
    assert in_use.shared_tokens(0, asked, cached_tokens) >= 0.95 * cached_tokens


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # endpoint
            st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=3),
            st.booleans(),  # ends
        ),
        max_size=12,
    ),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=3),
    st.integers(0, 90),
)
def test_it_is_the_longest_shared_beginning_in_whole_strides(
    sent: list[tuple[int, list[tuple[int, int]], bool]],
    ordinal: int,
    asked: list[tuple[int, int]],
    cached_blocks: int,
) -> None:
    in_use = PromptsInUse()
    live: dict[RequestId, tuple[int, list[int]]] = {}
    for index, (at, parts, _) in enumerate(sent):
        each = request(f"r{index}", chain(*parts))
        in_use.hold(at, each)
        live[each.id] = at, chain(*parts)
    for index, (_, _, ends) in enumerate(sent):
        if ends:
            in_use.let_go(RequestId(f"r{index}"))
            del live[RequestId(f"r{index}")]
    in_use.validate(set(live))
    keys = chain(*asked)
    most = 0
    for at, held in live.values():
        common = next((i for i, (a, b) in enumerate(zip(held, keys, strict=False)) if a != b), None)
        shared = min(len(held), len(keys)) if common is None else common
        most = max(most, shared if at == ordinal else 0)
    expected = min(most, cached_blocks) // STRIDE_BLOCKS * STRIDE_TOKENS
    assert in_use.shared_tokens(ordinal, request("x", keys), cached_blocks * BLOCK_TOKENS) == expected
