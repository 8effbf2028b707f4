"""No text from elsewhere reaches a terminal as a command."""

import pytest

from dslt.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\u202eb\u200bc", "a\\u202eb\\u200bc"),
        ("a\rb\x9bc\0", "a\\rb\\x9bc\\x00"),
        ("\ud800", "\\ud800"),
        ("two\nlines", "two\nlines"),
        ("é☃ 東京 😀", "é☃ 東京 😀"),
    ],
)
def test_what_is_not_printable_is_spelt_out(text, shown):
    assert printable(text) == shown


def test_line_breaks_stay_only_where_they_may():
    assert printable("a\nb", keep="") == "a\\nb"
