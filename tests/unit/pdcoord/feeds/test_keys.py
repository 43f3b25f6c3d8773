"""The keys file: every fault on its line, and no key or secret in what is said of it."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pdcoord.feeds.keys import parse_keys
from pdcoord.front.keys import KEY_RANDOM_BYTES, ApiKey, digest_of, make_key
from pdcoord.policy.errors import PolicyError

KEY = make_key(bytes(range(KEY_RANDOM_BYTES)))
HASH = digest_of(KEY.encode()).hex()
SECRET = base64.b64encode(bytes(range(32))).decode()
HEAD = f"apiVersion: pdcoord.io/v1alpha1\nkind: ApiKeys\ncache_salt_secret: {SECRET}\n"


def entry(**fields: Any) -> str:
    listed = {"name": "a", "sha256": HASH, "tenant": "team"} | fields
    written = json.dumps({name: value for name, value in listed.items() if value is not None})
    return f"{HEAD}keys:\n  - {written}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as refused:
        parse_keys(text.encode(), "keys.yaml")
    return [str(problem) for problem in refused.value.problems]


def test_a_whole_entry_is_what_it_says() -> None:
    text = entry(
        salt_group="friends",
        models=["m", "org/n"],
        objectives=["gold", "*"],
        requests_per_minute=5,
        tokens_per_minute=7,
        expires_at="2027-06-30T02:00:00+02:00",
    )
    ring = parse_keys(text.encode(), "f")
    assert ring.salt_secret == bytes(range(32))
    assert ring.keys == (
        ApiKey(
            "a",
            bytes.fromhex(HASH),
            "team",
            "group friends",
            frozenset({"m", "org/n"}),
            5,
            7,
            1_814_313_600.0,
            frozenset({"gold", "*"}),
        ),
    )


def test_what_is_left_out_is_not_limited() -> None:
    (key,) = parse_keys(entry().encode(), "f").keys
    assert key == ApiKey("a", bytes.fromhex(HASH), "team", "tenant team", None, None, None, None, frozenset())


@pytest.mark.parametrize("keys", ["keys: []\n", "keys:\n"])
def test_a_file_may_let_nobody_in(keys: str) -> None:
    assert parse_keys((HEAD + keys).encode(), "f").keys == ()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "A"}, 'keys[0].name: is "A", expected up to 63 lower-case'),
        ({"sha256": HASH.upper()}, "keys[0].sha256: is not the SHA-256 of a key"),
        ({"sha256": KEY}, "keys[0].sha256: is not the SHA-256 of a key"),
        ({"sha256": 12}, "keys[0].sha256: is not the SHA-256 of a key"),
        ({"sha256": None}, "keys[0].sha256: is missing, expected 64 digits of 0-9a-f"),
        ({"tenant": "two words"}, 'keys[0].tenant: is "two words", expected up to 128 visible'),
        ({"models": []}, "keys[0].models: is a list of 0, expected a list of 1 to 256 entries"),
        ({"objectives": []}, "keys[0].objectives: is a list of 0, expected a list of 1 to 64 entries"),
        ({"objectives": ["two words"]}, 'keys[0].objectives[0]: is "two words", expected up to 128'),
        ({"requests_per_minute": 0}, "keys[0].requests_per_minute: is 0, expected a whole number from 1"),
        ({"tokens_per_minute": 1.5}, "keys[0].tokens_per_minute: is 1.5, expected a whole number"),
        ({"expires_at": "2027-06-30"}, 'keys[0].expires_at: is "2027-06-30", expected a time with its zone'),
        ({"expires_at": 2027}, "keys[0].expires_at: is 2027, expected a time with its zone"),
        ({"salt-group": "x"}, "keys[0].salt-group: is not a known key; did you mean salt_group?"),
    ],
)
def test_a_fault_is_said_on_its_line(fields: dict[str, Any], said: str) -> None:
    (problem,) = problems(entry(**fields))
    assert problem.startswith(f"keys.yaml:5: {said}")


@pytest.mark.parametrize("secret", ["short", "?" * 60, "12345", base64.b64encode(bytes(31)).decode()])
def test_a_weak_salt_secret_is_refused_and_not_repeated(secret: str) -> None:
    (problem,) = problems(entry().replace(SECRET, secret))
    assert problem.startswith("keys.yaml:3: cache_salt_secret: is not 32 bytes or more in base64; ")
    assert secret not in problem


@pytest.mark.parametrize("secret", ["-_" * 24, "+/" * 24, SECRET.rstrip("=")])
def test_either_base64_will_do(secret: str) -> None:
    assert len(parse_keys(entry().replace(SECRET, secret).encode(), "f").salt_secret) >= 32


def test_no_name_and_no_key_is_there_twice() -> None:
    one = json.dumps({"name": "a", "sha256": HASH, "tenant": "t"})
    found = problems(f"{HEAD}keys:\n  - {one}\n  - {one}\n")
    assert [problem.split(", which")[1] for problem in found] == [" line 5 already has; change one"] * 2


@pytest.mark.parametrize("field", ["name", "sha256", "tenant", "expires_at", KEY])
def test_a_key_in_the_wrong_place_is_in_no_message(field: str) -> None:
    text = entry(**{field: f"{KEY} "})
    assert all(KEY[:20] not in problem for problem in problems(text))


def test_a_file_is_one_document_of_its_kind() -> None:
    assert problems(f"{entry()}---\n{entry()}") == ["keys.yaml: holds 2 documents, expected one"]
    assert problems(entry().replace("ApiKeys", "PoolPolicy")) == [
        'keys.yaml:2: kind: is "PoolPolicy", expected ApiKeys'
    ]
    assert "is not YAML" in problems("keys: [")[0]


def test_the_page_shows_a_file_that_is_taken() -> None:
    page = (Path(__file__).parents[4] / "docs" / "keys.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (key,) = parse_keys(shown.encode(), "docs/keys.md").keys
    assert (key.name, key.tenant, key.requests_per_minute) == ("chat", "team-chat", 600)
