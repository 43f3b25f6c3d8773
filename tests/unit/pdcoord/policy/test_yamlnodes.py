"""Tests of reading YAML text: scalars, lines, and every limit."""

import contextlib
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.policy import yamlnodes
from pdcoord.policy.yamlnodes import DEPTH_MAX, DataBuilder, PlainData, YamlTextError, read_nodes


def read(text: str) -> list[PlainData]:
    builder = DataBuilder()
    return [builder.build(root) for root in read_nodes(text, documents_max=8)]


@pytest.fixture(params=["libyaml", "python"], autouse=True)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers, since the fast one is not in every build of it."""
    if request.param == "libyaml" and not hasattr(yaml, "CSafeLoader"):
        pytest.skip("this PyYAML was built without libyaml")
    name = "CSafeLoader" if request.param == "libyaml" else "SafeLoader"
    monkeypatch.setattr(yamlnodes, "_LOADER", getattr(yaml, name))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1),
        ("-12", -12),
        ("+3", 3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1.5", 1.5),
        ("1e9", 1e9),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # Text by the core schema, where YAML 1.1 sees booleans, an octal, a base-60 number, a date.
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ('"1"', "1"),
        ("!!str 1", "1"),
        ("! 1", "1"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_follow_the_core_schema(written: str, value: object) -> None:
    (plain,) = read(f"key: {written}")
    assert plain.data == {"key": value}
    assert isinstance(plain.data, dict)
    assert type(plain.data["key"]) is type(value)


def test_not_a_number_is_read_as_such() -> None:
    (plain,) = read("key: .nan")
    assert isinstance(plain.data, dict)
    assert math.isnan(plain.data["key"])  # type: ignore[arg-type]


def test_every_value_has_the_line_where_it_is_written() -> None:
    (plain,) = read("a:\n  b: 1\n  c:\n    - x\n    - {d: 2,\n       e: 3}\n")
    assert plain.data == {"a": {"b": 1, "c": ["x", {"d": 2, "e": 3}]}}
    assert plain.lines == {
        (): 1,
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("a", "c", 1, "d"): 5,
        ("a", "c", 1, "e"): 6,
    }


def test_an_alias_is_used_here_and_written_there() -> None:
    (plain,) = read("a: &x\n  k: 1\n\nb: *x\n")
    assert plain.data == {"a": {"k": 1}, "b": {"k": 1}}
    assert plain.lines["b",] == 4
    assert plain.lines["b", "k"] == 2


def test_merged_keys_yield_to_written_ones_and_later_sources_to_earlier() -> None:
    (plain,) = read("x: &x {a: 1, b: 1, c: 1}\ny: &y {b: 2, d: 2}\nz: {<<: [*x, *y], a: 9}\n")
    assert isinstance(plain.data, dict)
    assert plain.data["z"] == {"a": 9, "b": 1, "c": 1, "d": 2}
    assert not plain.problems


def test_keys_that_repeat_or_are_not_text_are_problems_all_of_them() -> None:
    (plain,) = read("a: 1\na: 2\n3: x\nb: {c: 1, c: 2}\n? [k]\n: v\n<<: 5\n")
    assert [(line, path) for line, path, _ in plain.problems] == [
        (2, ()),
        (3, ()),
        (5, ()),
        (7, ()),
        (4, ("b",)),
    ]
    assert plain.problems[0][2] == 'key "a" is already set on line 1; keep one'
    assert plain.data == {"a": 1, "b": {"c": 1}}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", None, "is not YAML: "),
        ("a: 'x\n", 1, "is not YAML: "),
        ("a: 1\n\tb: 2\n", 2, "is not YAML: "),
        ("a: 1\nb: \x07\n", 2, "is not YAML: holds a control character"),
        ("a: *x\n", 1, 'alias "x" has no anchor that ended before it'),
        ("a: &x [*x]\n", 1, 'alias "x" has no anchor that ended before it'),
        ("a: 1\n--- \nb: 1\nc: !!python/object:os.system x\n", 4, 'tag "!!python/object:os.system" is not'),
        ("a: !!int '1'\n", 1, 'tag "!!int" is not'),
        ("a: !x {b: 1}\n", 1, 'tag "!x" is not'),
        ("a: !!set {b}\n", 1, 'tag "!!set" is not'),
        ("a: " + "[" * 40, 1, f"nests deeper than {DEPTH_MAX} levels"),
        ("a: " + "[" * 100_000, 1, f"nests deeper than {DEPTH_MAX} levels"),
        ("a: " + "9" * 70, 1, "holds a number of 70 characters, 64 are allowed"),
        ("--- 1\n" * 9, 9, "holds more than 8 documents; split it"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_its_line(text: str, line: int | None, message: str) -> None:
    with pytest.raises(YamlTextError) as caught:
        read(text)
    assert caught.value.message.startswith(message)
    if line is not None:
        assert caught.value.line == line


def test_aliases_that_multiply_are_stopped() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(YamlTextError, match="more than 200000 values once aliases are expanded"):
        read("\n".join(levels))


def test_aliases_that_deepen_are_stopped() -> None:
    levels = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 60))]
    with pytest.raises(YamlTextError, match="levels once aliases are expanded"):
        read("\n".join(levels))


def test_merges_that_deepen_are_stopped() -> None:
    levels = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: *a{i - 1}}}" for i in range(1, 500))]
    with pytest.raises(YamlTextError, match="merges through more than"):
        read("\n".join(levels))


def test_merges_that_multiply_are_stopped() -> None:
    wide = ", ".join(f"k{i}: 1" for i in range(1000))
    text = f"a: &a {{{wide}}}\nb: {{<<: [{', '.join(['*a'] * 1000)}]}}\n"
    with pytest.raises(YamlTextError, match="more than 200000 values"):
        read(text)


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class _Dumper(yaml.SafeDumper):
    """Writes no aliases and quotes whatever YAML 1.1 and the core schema could read apart."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("!", text, style='"'))


@given(plain_data)
@settings(deadline=None, max_examples=50)
def test_what_is_written_is_what_is_read(data: object) -> None:
    """Any plain data survives, with a line for every value."""
    text = yaml.dump(data, Dumper=_Dumper, allow_unicode=False, default_flow_style=False)
    (plain,) = read(text)
    assert plain.data == data
    assert () in plain.lines
    assert all(1 <= line <= text.count("\n") + 1 for line in plain.lines.values())


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(YamlTextError):
        read(text)
