"""YAML is read as plain data and nothing else, and what is written is read back."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipes.strict import dump, parse

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)


@pytest.mark.parametrize(
    "scalar",
    [
        *("5:50", "1:30.5", "017", "08", "0o17", "0x1F", "0b1", "1_000", "1_0.5", "yes", "No", "on", "OFF", "y", "N"),
        *("2026-07-01", "2026-07-01 10:00:00", "=", ".inf", "-.INF", ".nan", "1e999", "1" * 19, "1" * 5000),
    ],
)
def test_what_readers_of_yaml_disagree_about_is_refused_and_text_in_quotes(scalar):
    with pytest.raises(ValueError, match=r"line 1, column 1: .* is read as different things: put it in quotes"):
        parse(scalar)
    assert parse(f"{{a: '{scalar}'}}") == {"a": scalar}
    assert parse(dump([scalar])) == [scalar]


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        *[("1", 1), ("-0", 0), ("+3", 3), ("1e-4", 1e-4), ("1E3", 1000.0), ("2.0e-4", 2e-4), (".5", 0.5), ("1.", 1.0)],
        *[("9" * 18, int("9" * 18)), ("true", True), ("False", False), ("~", None), ("", None), ("null", None)],
        *[(text, text) for text in ("truely", "1e", "1-2", "v1.0", "a:b", "localhost:8000", "1.5.2", "e5", "yes sir")],
    ],
)
def test_plain_scalars_are_what_they_are_in_json(scalar, value):
    assert parse(scalar) == value
    assert type(parse(scalar)) is type(value)


@settings(deadline=None)
@given(
    st.recursive(
        PLAIN,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)
@example(["1e4", "1e-4", "08", "0o17", "y", "1.", "-.5e3", "null", "~", "", "=", "<<", "\u0661.5", "1.\u0665"])
@example(dict.fromkeys(["1", "true", "null", "1e4", "<<", "=", "y"]))
def test_what_is_dumped_is_read_as_the_same(content):
    assert parse(dump(content)) == content


def test_what_stands_twice_is_written_twice():
    same = ["x"]
    assert parse(dump([same, same])) == [same, same]
