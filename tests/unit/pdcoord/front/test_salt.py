"""Cache salts part those who do not trust each other, and are the same on every replica."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.front.salt import SALTED_PATHS, cache_salt, named_group, tenant_group
from pdcoord.protocol.openai import APIS

SECRET = bytes(range(32))
TEXTS = st.text(max_size=8)


def test_a_salt_is_what_it_was_before_a_restart() -> None:
    salt = cache_salt(SECRET, tenant_group("team-a"), "")
    assert salt == "gES0ucZAeAK-0UU2YCF8Q3Q-yJjW8ae4mfXwT9XgDfI"


@given(st.tuples(TEXTS, TEXTS), st.tuples(TEXTS, TEXTS))
def test_salts_are_equal_where_group_and_own_salt_are(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (cache_salt(SECRET, *one) == cache_salt(SECRET, *other)) == (one == other)


@given(st.text())
def test_engines_take_every_salt(own: str) -> None:
    salt = cache_salt(SECRET, "g", own)
    assert len(salt) == 43
    assert not {*salt} & set("@/\\\0")


def test_nobody_makes_a_salt_without_the_secret() -> None:
    assert cache_salt(SECRET, "g", "") != cache_salt(bytes(32), "g", "")


@given(TEXTS, TEXTS)
def test_no_tenant_is_a_named_group(tenant: str, name: str) -> None:
    assert tenant_group(tenant) != named_group(name)


def test_calls_that_leave_kv_behind_are_salted() -> None:
    assert frozenset(APIS) - SALTED_PATHS == {"/tokenize", "/detokenize"}
