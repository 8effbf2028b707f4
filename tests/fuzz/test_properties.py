"""What any text, table, expression or JSON document may hold, through each reader of such."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed (extra `test`)")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import targets
from test_fuzz import RUNS, SLOW

CI = settings(
    max_examples=RUNS,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LINE = TEXT.filter(lambda text: text.strip())
ROWS = st.lists(
    st.fixed_dictionaries({"q": LINE, "a": st.none() | LINE, "why": st.none() | LINE}),
    min_size=1,
    max_size=4,
)


@CI
@given(rows=ROWS)
def test_any_text_passes_through_a_table_and_the_records(rows):
    rows = [row | {"n": str(i), "part": "train"} for i, row in enumerate(rows)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    assert targets.TARGETS["read_jsonl_table"](lines.encode())
    assert targets.TARGETS["read_jsonl_table"](json.dumps(rows, ensure_ascii=False).encode())


@CI
@given(text=TEXT)
def test_any_text_is_a_completion_and_perhaps_an_equation(text):
    assert targets.TARGETS["completion"](text.encode())
    targets.TARGETS["equation"](text.encode())


NUMBER = st.from_regex(r"[0-9]{1,4}(\.[0-9]{1,3})?", fullmatch=True)
EXPRESSION = st.recursive(
    NUMBER,
    lambda inner: (
        st.builds("( {} {} {} )".format, inner, st.sampled_from("+-*/"), inner)
        | st.builds("-{}".format, inner)
    ),
    max_leaves=20,
)


@CI
@given(text=EXPRESSION)
def test_arithmetic_has_pythons_value(text):
    targets.TARGETS["equation"](text.encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@CI
@given(value=JSON, name=st.sampled_from([name for name in targets.TARGETS if name not in SLOW]))
def test_any_json_is_read_or_refused(value, name):
    targets.TARGETS[name](json.dumps(value).encode())


@CI
@given(data=st.binary(max_size=200), name=st.sampled_from(list(targets.TARGETS)))
def test_any_bytes_are_read_or_refused(data, name):
    targets.TARGETS[name](data)
