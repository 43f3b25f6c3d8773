"""Keys of blocks: equal keys mean equal prefixes of the same model and tenant."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.blocks import PROMPT_BLOCKS_MAX, block_keys, token_keys

prompts = st.binary(max_size=200)
sizes = st.integers(1, 32)


def keys(prompt: bytes, size: int, model: str = "m", salt: str = "") -> tuple[int, ...]:
    return block_keys(prompt, model=model, cache_salt=salt, block_bytes=size)


@given(prompts, sizes)
def test_there_is_one_key_of_64_bits_for_each_full_block(prompt: bytes, size: int) -> None:
    found = keys(prompt, size)
    assert len(found) == len(prompt) // size
    assert all(0 <= key < 1 << 64 for key in found)


@given(st.text(alphabet="ab", max_size=40), st.text(alphabet="ab", max_size=40), st.integers(1, 8))
def test_keys_agree_exactly_as_long_as_the_blocks_do(one: str, two: str, size: int) -> None:
    first, second = keys(one.encode(), size), keys(two.encode(), size)
    shared = sum(
        1
        for index in range(min(len(first), len(second)))
        if one[: (index + 1) * size] == two[: (index + 1) * size]
    )
    agreeing = len(
        list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    )
    assert agreeing == shared


@given(prompts, prompts, sizes)
def test_a_longer_prompt_keeps_the_keys_of_its_prefix(prompt: bytes, more: bytes, size: int) -> None:
    found = keys(prompt, size)
    assert keys(prompt + more, size)[: len(found)] == found


@given(st.binary(min_size=16, max_size=64), st.text(max_size=8), st.text(max_size=8))
def test_neither_models_nor_tenants_share_keys(prompt: bytes, one: str, two: str) -> None:
    if one != two:
        assert not set(keys(prompt, 8, model=one)) & set(keys(prompt, 8, model=two))
        assert not set(keys(prompt, 8, salt=one)) & set(keys(prompt, 8, salt=two))


def test_the_same_block_further_on_has_another_key() -> None:
    assert len(set(keys(b"x" * 64, 8))) == 8


def test_a_prompt_without_end_is_hashed_to_a_bound() -> None:
    assert len(keys(b"x" * (PROMPT_BLOCKS_MAX + 100), 1)) == PROMPT_BLOCKS_MAX


def test_keys_are_the_same_in_every_process() -> None:
    # Replicas of the coordinator must agree, and recorded runs must replay.
    assert keys(b"abcdefgh", 4) == (0x9B34A36EFBCD75B6, 0x1B880E2A978913D2)


tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@given(tokens, tokens, sizes)
def test_token_keys_agree_as_long_as_the_blocks_do(one: list[int], two: list[int], size: int) -> None:
    first = token_keys(one, model="m", block_tokens=size)
    second = token_keys(one[: size * 2] + two, model="m", block_tokens=size)
    assert len(first) == len(one) // size
    for index, (mine, other) in enumerate(zip(first, second, strict=False), 1):
        is_same = one[: index * size] == (one[: size * 2] + two)[: index * size]
        assert (mine == other) == is_same


def test_keys_are_of_their_model_salt_and_adapter_alone() -> None:
    triples = [
        ("m", "", ""),
        ("m", "a", ""),
        ("m", "", "a"),
        ("ma", "", ""),
        ("m", "1:a\0", ""),
        ("m", "a", "a"),
    ]
    found = {
        token_keys([1, 2], model=model, cache_salt=salt, lora=lora, block_tokens=1)
        for model, salt, lora in triples
    }
    assert len(found) == len(triples)
    found = {
        block_keys(b"ab", model=model, cache_salt=salt, lora=lora, block_bytes=1)
        for model, salt, lora in triples
    }
    assert len(found) == len(triples)
    assert len(token_keys([0] * (PROMPT_BLOCKS_MAX + 9), model="m", block_tokens=1)) == PROMPT_BLOCKS_MAX


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_out_of_range_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        token_keys([token], model="m", block_tokens=1)
