"""Every fault of a JSON document is a ValueError."""

import json

import pytest

from dslt import strict_json


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', '{"\\uDFFF": 1}']
)
@pytest.mark.parametrize("kind", [str, bytes])
def test_what_is_no_json_is_a_value_error(text, kind):
    with pytest.raises(ValueError):
        strict_json.loads(text if kind is str else text.encode())


@pytest.mark.parametrize("content", [b'"\xff"', b'"\xed\xa0\x80"', '"\\ud800"'.encode("utf-16")])
def test_bytes_that_are_no_utf8_are_a_value_error(content):
    with pytest.raises(ValueError):
        strict_json.loads(content)


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"\\\\ud800"', '"ĂUD"', "1e999"])
def test_what_is_json_is_read(text):
    assert strict_json.loads(text) == strict_json.loads(text.encode()) == json.loads(text)
