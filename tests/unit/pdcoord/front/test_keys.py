"""Keys are found by their hash, expire, and stay out of whatever people see."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.front.keys import (
    KEY_RANDOM_BYTES,
    ApiKey,
    KeyFault,
    KeyRing,
    digest_of,
    make_key,
    presented_key,
    without_keys,
)

ONE, OTHER = (make_key(bytes([byte]) * KEY_RANDOM_BYTES) for byte in (1, 2))


def api_key(key: str = ONE, **fields: object) -> ApiKey:
    return ApiKey(
        **{"name": "a", "digest": digest_of(key.encode()), "tenant": "t", "salt_group": "g"} | fields
    )  # type: ignore[arg-type]


def ring(*keys: ApiKey) -> KeyRing:
    return KeyRing(keys, bytes(32))


@pytest.mark.parametrize(
    ("objectives", "may"), [((), False), (("gold",), True), (("silver",), False), (("*",), True)]
)
def test_what_is_above_the_usual_needs_to_be_the_keys_own(objectives: tuple[str, ...], may: bool) -> None:
    key = api_key(objectives=frozenset(objectives))
    assert key.may_ask_for("gold", 1) is may
    assert key.may_ask_for("gold", 0)
    assert key.may_ask_for("gold", -1)


def test_a_key_is_found_by_what_it_hashes_to_and_by_nothing_else() -> None:
    mine = api_key()
    keys = ring(mine)
    assert keys.find(ONE.encode(), 0.0) is mine
    for other in (OTHER.encode(), b"", b"pdc_", ONE.encode() + b"x", ONE.encode()[:-1], ONE.upper().encode()):
        assert keys.find(other, 0.0) is KeyFault.UNKNOWN


@pytest.mark.parametrize("weak", [b"password", b"sk-abcdef", b"pdc_short", b"x" * 4_000])
def test_what_is_no_key_of_ours_is_not_taken_even_if_the_file_has_its_hash(weak: bytes) -> None:
    assert ring(api_key(digest=digest_of(weak))).find(weak, 0.0) is KeyFault.UNKNOWN


def test_a_key_is_taken_up_to_its_last_moment() -> None:
    mine = api_key(expires_unix_s=100.0)
    assert ring(mine).find(ONE.encode(), 99.999) is mine
    assert ring(mine).find(ONE.encode(), 100.0) is KeyFault.EXPIRED


def test_a_key_is_for_the_models_it_names_by_any_of_their_names() -> None:
    assert api_key().is_for(("m",))
    limited = api_key(models=frozenset({"alias", "other"}))
    assert limited.is_for(("m", "alias"))
    assert not limited.is_for(("m",))


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([(b"authorization", b"Bearer k")], b"k"),
        ([(b"authorization", b"  bEaReR   k \t")], b"k"),
        ([(b"x-api-key", b" k ")], b"k"),
        ([(b"authorization", b"Bearer k"), (b"x-api-key", b"k"), (b"x-api-key", b"k")], b"k"),
        ([(b"authorization", b"Bearer k"), (b"x-api-key", b"l")], KeyFault.AMBIGUOUS),
        ([(b"authorization", b"Bearer k"), (b"authorization", b"Bearer l")], KeyFault.AMBIGUOUS),
        ([(b"authorization", b"Basic k")], KeyFault.MISSING),
        ([(b"authorization", b"Bearer")], KeyFault.MISSING),
        ([(b"authorization", b"Bearer  ")], KeyFault.MISSING),
        ([(b"x-api-key", b"")], KeyFault.MISSING),
        ([], KeyFault.MISSING),
    ],
)
def test_a_key_is_read_from_either_header(headers: list[tuple[bytes, bytes]], found: object) -> None:
    assert presented_key(headers) == found


@given(st.binary(min_size=KEY_RANDOM_BYTES, max_size=KEY_RANDOM_BYTES))
def test_every_key_that_is_made_is_taken_and_masked(random_bytes: bytes) -> None:
    key = make_key(random_bytes)
    assert base64.urlsafe_b64decode(key[4:] + "=") == random_bytes
    mine = api_key(key)
    assert ring(mine).find(key.encode(), 0.0) is mine
    assert without_keys(f'is "{key}", expected') == 'is "pdc_...", expected'


@given(st.binary(max_size=600))
def test_no_text_brings_anybody_in_by_chance(presented: bytes) -> None:
    assert ring(api_key()).find(presented, 0.0) is KeyFault.UNKNOWN
