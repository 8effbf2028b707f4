"""One table as Markdown and CSV: what a run holds cannot leave its cell."""

import csv
import io

import pytest

from dslt.report.formats import Table, to_csv, to_markdown


def table(*rows, columns=("run", "value")):
    return Table("t", "a | caption", columns, rows)


def test_numbers_stand_right_and_unrounded_in_csv():
    made = table(("a", 0.123456789), ("b", None), ("c", 263168))
    assert made.numeric() == [False, True]
    assert to_markdown(made).splitlines()[2:] == [
        "| run | value |", "| --- | ---: |", "| a | 0.1235 |", "| b | – |", "| c | 263,168 |",
    ]  # fmt: skip
    assert list(csv.reader(io.StringIO(to_csv(made), newline=""))) == [
        ["run", "value"], ["a", "0.123456789"], ["b", ""], ["c", "263168"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "is_number"),
    [
        (("71.8 ± 4.1", None), True),
        (("+1.2", "−0.3"), True),
        (("< 0.001", "0.5"), True),
        (("25 % (68.4 ± 1.9)", "never"), False),
        (("25 % (68.4 ± 1.9)",), False),
        (("1 run",), False),
    ],
)
def test_columns_of_numbers_are_known(cells, is_number):
    assert table(*(("a", cell) for cell in cells)).numeric()[1] is is_number


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "|", " =", "＝"])
def test_no_cell_is_a_formula(start):
    text = f'{start}HYPERLINK("http://x","a")'
    [_, [cell, number]] = csv.reader(io.StringIO(to_csv(table((text, -1.5))), newline=""))
    assert cell == "'" + text and number == "-1.5"


def test_signed_numbers_are_numbers_in_csv():
    rows = to_csv(table(("+0.9", "−6.5"), ("-3", "−7.7 to 13.1"), ("+٣", "-0049"))).splitlines()[1:]
    assert rows == ["0.9,-6.5", "-3,−7.7 to 13.1", "'+٣,'-0049"]


def test_markdown_keeps_hostile_text_in_its_cell():
    text = "a|b\n| c |\r\n<img src=x onerror=alert(1)> [x](http://y) **b** `c` \\| &lt;"
    lines = to_markdown(table((text, "x"), ("d", "y"))).splitlines()
    assert len(lines) == 6 and lines[0] == "a \\| caption"
    assert lines[4] == (
        "| a\\|b \\| c \\| &lt;img src=x onerror=alert(1)\\> \\[x\\](http://y) \\*\\*b\\*\\* "
        "\\`c\\` \\\\\\| &amp;lt; | x |"
    )
