"""A file appears whole or not at all."""

import pytest

from dslt.files import replacing, write_text


def test_replaces_at_the_end_of_the_block_and_makes_parents(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old\n")
    with replacing(path) as file:
        file.write("né\n")
        assert path.read_text() == "old\n"
    assert path.read_bytes() == "né\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_stood_there_and_nothing_else(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, "wb") as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
