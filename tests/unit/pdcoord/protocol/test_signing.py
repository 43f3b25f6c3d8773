"""Signatures of what steers a sidecar."""

import hashlib
import hmac
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.signing import SKEW_S_MAX, Doubt, KeysError, PlanKeys, Steering, read_keys

OLD, NEW = b"o" * 32, b"n" * 32
NOW_S = 1_800_000_000.4
WHAT = Steering(b"POST", b"/v1/completions", b"r-1", plan=b'{"prefills":[]}', prefills=b"10.0.0.1:8000")
parts = st.binary(max_size=24)
whats = st.tuples(parts, parts, parts, parts, parts, parts)


def test_the_code_is_what_the_module_says() -> None:
    text = (
        b"2:v1" + b"1:a" + b"10:1800000000" + b"4:POST" + b"15:/v1/completions" + b"3:r-1"
        b'15:{"prefills":[]}' + b"13:10.0.0.1:8000" + b"0:"
    )
    mac = hmac.new(OLD, text, hashlib.sha256).hexdigest()
    assert PlanKeys({"a": OLD}).sign(WHAT, NOW_S) == f"v1;kid=a;ts=1800000000;mac={mac}".encode()


@given(whats)
def test_what_was_signed_is_believed(signed: tuple[bytes, ...]) -> None:
    keys, what = PlanKeys({"a": OLD}), Steering(*signed)
    assert keys.doubt(what, keys.sign(what, NOW_S), NOW_S) is None


@given(whats, whats)
def test_nothing_else_is(signed: tuple[bytes, ...], claimed: tuple[bytes, ...]) -> None:
    keys = PlanKeys({"a": OLD})
    signature = keys.sign(Steering(*signed), NOW_S)
    assert (keys.doubt(Steering(*claimed), signature, NOW_S) is None) is (signed == claimed)


def test_keys_rotate_without_a_gap() -> None:
    before, both, swapped, after = (
        PlanKeys(keys)
        for keys in (
            {"old": OLD},
            {"old": OLD, "new": NEW},
            {"new": NEW, "old": OLD},
            {"new": NEW},
        )
    )
    steps = [before, both, swapped, after]
    for signer, verifier in itertools.pairwise(steps):
        assert verifier.doubt(WHAT, signer.sign(WHAT, NOW_S), NOW_S) is None
        assert signer.doubt(WHAT, verifier.sign(WHAT, NOW_S), NOW_S) is None
    assert after.doubt(WHAT, before.sign(WHAT, NOW_S), NOW_S) is Doubt.KEY_UNKNOWN


@pytest.mark.parametrize(("late_s", "doubt"), [(0, None), (1, Doubt.TOO_OLD)])
def test_a_signature_is_good_for_the_skew_either_way(late_s: int, doubt: Doubt | None) -> None:
    keys = PlanKeys({"a": OLD})
    signature = keys.sign(WHAT, NOW_S)
    second = int(NOW_S)
    for now_s in (second + SKEW_S_MAX + late_s, second - SKEW_S_MAX - late_s):
        assert keys.doubt(WHAT, signature, now_s) is doubt


def test_a_time_that_was_changed_is_wrong_however_young_it_looks() -> None:
    keys = PlanKeys({"a": OLD})
    signature = keys.sign(WHAT, NOW_S - 3_600)
    younger = signature.replace(b"%d" % int(NOW_S - 3_600), b"%d" % int(NOW_S))
    assert keys.doubt(WHAT, younger, NOW_S) is Doubt.WRONG


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"v2;kid=a;ts=1800000000;mac=" + b"0" * 64,
        b"v1;kid=a;ts=1800000000;mac=" + b"0" * 63,
        b"v1;kid=a;ts=1800000000;mac=" + b"G" * 64,
        b"v1;kid=a b;ts=1800000000;mac=" + b"0" * 64,
        b"v1;kid=;ts=1800000000;mac=" + b"0" * 64,
        b"v1;kid=a;ts=-1;mac=" + b"0" * 64,
        b"v1;kid=a;ts=9999999999999;mac=" + b"0" * 64,
        b"v1;kid=a;ts=1800000000;mac=" + b"0" * 64 + b"\n",
        b"v1;kid=a;ts=1800000000;mac=" + b"0" * 4_000,
    ],
)
def test_what_is_no_signature_is_malformed(signature: bytes) -> None:
    assert PlanKeys({"a": OLD}).doubt(WHAT, signature, NOW_S) is Doubt.MALFORMED


def test_no_signature_and_a_wrong_one() -> None:
    keys = PlanKeys({"a": OLD})
    assert keys.doubt(WHAT, None, NOW_S) is Doubt.MISSING
    assert keys.doubt(WHAT, PlanKeys({"a": NEW}).sign(WHAT, NOW_S), NOW_S) is Doubt.WRONG


def test_keys_are_read_in_order() -> None:
    keys = read_keys(f"# of this month\nnew: {NEW.decode()}\n\nold:{OLD.decode()}\n")
    assert keys.doubt(WHAT, PlanKeys({"old": OLD}).sign(WHAT, NOW_S), NOW_S) is None
    assert keys.sign(WHAT, NOW_S) == PlanKeys({"new": NEW}).sign(WHAT, NOW_S)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are 0 keys"),
        ("\n".join(f"k{index}:{'s' * 32}" for index in range(17)), "there are 17 keys"),
        ("a:short-secret", "the secret of key a has 12 bytes"),
        (f"a:{'s' * 5_000}", "the secret of key a has 5000 bytes"),
        (f"a b:{'s' * 32}", "a key's name is not"),
        (f"a:{'s' * 32}\na:{'t' * 32}", "line 2 has the name of an earlier line"),
        ("s" * 32, "line 1 is not NAME:SECRET"),
    ],
)
def test_keys_that_cannot_be_used_are_told_without_their_secrets(text: str, said: str) -> None:
    with pytest.raises(KeysError, match=said) as caught:
        read_keys(text)
    assert "short-secret" not in str(caught.value)
    assert "ssss" not in str(caught.value)
