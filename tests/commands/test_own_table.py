"""`dslt extract` makes records of a table of one's own, without code."""

from dslt.main import main
from dslt.records import read_examples


def test_a_table_of_ones_own_becomes_records_without_code(tmp_path, capsys):
    table = tmp_path / "mine.csv"
    rows = [f"what is {i} ?,answer {i},because {i}" for i in range(20)]
    table.write_text("question,answer,why\n" + "\n".join(rows) + "\n")
    columns = ["--input_column", "question", "--label_column", "answer"]
    flags = ["--input_file", str(table), *columns, "--rationale_column", "why"]
    out = tmp_path / "records"
    assert main(["extract", "--dataset", "mine", *flags, "--output_dir", str(out)]) == 0
    examples = list(read_examples(out / "records.jsonl"))
    assert [e.split for e in examples].count("validation") == 2
    assert all(e.rationale and e.label for e in examples)
    assert "20 examples, 20 with a rationale" in capsys.readouterr().out


def test_a_table_of_test_rows_alone_is_read_too(tmp_path):
    table = tmp_path / "mine.jsonl"
    table.write_text('{"q": "what is it ?", "split": "test"}\n')
    flags = ["--input_file", str(table), "--input_column", "q", "--split_column", "split"]
    out = str(tmp_path / "records")
    assert main(["extract", "--dataset", "mine", *flags, "--output_dir", out]) == 0
    assert [e.split for e in read_examples(tmp_path / "records" / "records.jsonl")] == ["test"]
