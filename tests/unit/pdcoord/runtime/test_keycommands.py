"""What `pdcoord keys` prints can be put together to a file that is taken."""

import io
from pathlib import Path

import pytest

from pdcoord.feeds.keys import parse_keys
from pdcoord.front.keys import ApiKey
from pdcoord.runtime.keycommands import check, init, make


def made(name: str, **wanted: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    status = make(name, wanted, out, err)
    return status, out.getvalue(), err.getvalue()


def empty() -> str:
    out = io.StringIO()
    assert init(out) == 0
    return out.getvalue()


def write(folder: Path, text: str) -> Path:
    path = folder / "keys.yaml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def told(path: Path) -> tuple[int, str]:
    out = io.StringIO()
    return check([path], out), out.getvalue()


def test_a_file_grows_by_appending_entries() -> None:
    status, entry, said = made("a", tenant="team", models=["m"], requests_per_minute=5, objectives=["gold"])
    _, other, _ = made("b", tenant="123", expires_at="2027-01-01T00:00:00Z")
    key = said.splitlines()[0]
    assert status == 0
    assert key not in entry
    ring = parse_keys((empty() + entry + other).encode(), "f")
    found = ring.find(key.encode(), 0.0)
    assert isinstance(found, ApiKey)
    assert (found.name, found.tenant, found.models, found.requests_per_minute) == ("a", "team", {"m"}, 5)
    assert ring.keys[1].tenant == "123"
    assert [key.objectives for key in ring.keys] == [{"gold"}, set()]


def test_every_file_and_every_key_is_another() -> None:
    assert empty() != empty()
    assert made("a", tenant="t")[2] != made("a", tenant="t")[2]


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("A", {"tenant": "t"}, 'name is "A", expected up to 63 lower-case'),
        ("a", {"tenant": "two words"}, 'tenant is "two words", expected'),
        ("a", {"tenant": "t", "tokens_per_minute": 0}, "tokens_per_minute is 0, expected a whole number"),
        ("a", {"tenant": "t", "expires_at": "tomorrow"}, 'expires_at is "tomorrow", expected a time'),
    ],
)
def test_an_entry_that_would_not_be_taken_is_not_made(
    name: str, wanted: dict[str, object], said: str
) -> None:
    status, entry, error = made(name, **wanted)
    assert (status, entry) == (1, "")
    assert error.startswith(f"pdcoord keys make: {said}")
    assert "pdc_" not in error


def test_check_says_what_keys_allow(tmp_path: Path) -> None:
    _, entry, said = made("a", tenant="team", models=["m", "n"], expires_at="2020-01-01T00:00:00Z")
    _, other, _ = made("b", tenant="team", salt_group="friends", tokens_per_minute=7, objectives=["*"])
    _, third, _ = made("c", tenant="team", objectives=["gold", "best"])
    status, text = told(write(tmp_path, empty() + entry + other + third))
    head, titles, first, second, last = text.splitlines()
    assert (status, head) == (0, f"{tmp_path / 'keys.yaml'}: ok, 3 keys")
    at = titles.index("objectives")
    assert [line[at:].split("  ")[0].strip() for line in (first, second, last)] == ["-", "all", "best, gold"]
    assert "m, n" in first
    assert first.endswith("2020-01-01T00:00:00Z (expired)")
    assert ("group friends" in second, second.endswith("never")) == (True, True)
    assert said.splitlines()[0] not in text


def test_check_says_that_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    assert told(write(tmp_path, empty())) == (0, f"{tmp_path / 'keys.yaml'}: ok, 0 keys: nobody is let in\n")


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    status, text = told(write(tmp_path, empty().replace("ApiKeys", "Keys")))
    assert (status, text) == (1, f'{tmp_path / "keys.yaml"}:2: kind: is "Keys", expected ApiKeys\n')
