"""The inputs of `dslt predict`: a row a line, whatever the line holds."""

import io
import json
import types

import pytest

from dslt.commands.predict import read_inputs
from dslt.errors import InputError
from dslt.main import main


def inputs_of(tmp_path, data: bytes):
    path = tmp_path / "inputs.txt"
    path.write_bytes(data)
    return [row["input"] for row in read_inputs(str(path), None)]


def test_a_byte_order_mark_is_no_part_of_the_first_input(tmp_path):
    assert inputs_of(tmp_path, b'\xef\xbb\xbf{"input": "a"}\r\nb\n') == ["a", "b"]


def test_only_a_line_feed_ends_a_line(tmp_path):
    assert inputs_of(tmp_path, "a\u2028b\x0bc\x85d\n".encode()) == ["a\u2028b\x0bc\x85d"]


@pytest.mark.parametrize(
    "line",
    ["{", '{"input": 1}', "{}", '{"input": "\\ud800"}', '{"a":' * 9000, '{"a": ' + "9" * 5000],
)
def test_a_line_that_is_no_input_is_named(tmp_path, line):
    with pytest.raises(InputError, match=r"inputs.txt:2: "):
        inputs_of(tmp_path, f"a\n{line}\n".encode())


def test_a_split_is_asked_of_records_alone(tmp_path):
    path = tmp_path / "inputs.txt"
    path.write_text('{"input": "a", "split": "test"}\n\n{"input": "b", "split": "train"}\n')
    assert read_inputs(str(path), "test") == [{"input": "a"}]
    path.write_text('{"input": "a", "split": "test"}\nb\n')
    with pytest.raises(InputError, match=r"inputs.txt:2: plain text has no split"):
        read_inputs(str(path), "test")


def test_standard_input_that_is_no_text_is_an_input_error(monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"a\xff\n")))
    with pytest.raises(InputError, match="expected UTF-8"):
        read_inputs("-", None)


def test_plain_text_lines_are_inputs(run, tmp_path, capsys):
    texts = ["premise: ann has a cup .", "premise: bob has a hat ."]
    (tmp_path / "inputs.txt").write_text("\n\n".join(texts))
    assert main(["predict", "--student", str(run.path), str(tmp_path / "inputs.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["input"] for row in rows] == [
        "premise: ann has a cup .",
        "premise: bob has a hat .",
    ]
    assert all(row.keys() == {"input", "prediction"} for row in rows)
