"""No key is written anywhere: files, standard output and standard error, errors included.

That of the whole job, training and export included, is part of test_hostile.py.
"""

import json
import os

import pytest
from hostile import SECRETS, assert_no_secret
from hostile_server import answering, completion

from dslt.errors import InputError
from dslt.main import main
from dslt.teacher.endpoint import read_key
from dslt.teacher.prompts import load_prompt
from dslt.teacher.questions import EndpointTeacher

KEY = SECRETS["OPENAI_API_KEY"]

pytest.importorskip("openai", reason="the openai library is not installed (extra `teacher`)")


@pytest.fixture
def table(tmp_path):
    rows = [("q,a,part"), *(f"how many {n}?,yes,{('train', 'test')[n % 2]}" for n in range(10))]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def dslt(table, monkeypatch, capfd):
    """Runs the command where the table lies; returns its status and all that was printed."""
    monkeypatch.chdir(table)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)

    def run(*args):
        status = main(args)
        return status, "".join(capfd.readouterr())

    return run


def ask(dslt, url, *more):
    columns = ["--input_column", "q", "--label_column", "a", "--split_column", "part"]
    table = ["--dataset", "mine", "--input_file", "table.csv", *columns, "--keep", "legal"]
    teacher = ["--teacher", "endpoint", "--base_url", url, "--model", "m"]
    output = ["--output_dir", "out/records"]
    return dslt("extract", *table, *teacher, *output, *more)


def test_a_key_that_the_endpoint_echoes_is_written_nowhere(table, dslt):
    """In texts, reasoning, model, finish reason, and errors of every status that is told apart."""
    seen = []

    def answer(body, authorization):
        key = authorization.removeprefix("Bearer ")
        seen.append(key)
        number = len(seen)
        if number % 4 == 0:
            status = (500, 429, 400)[number // 4 % 3]
            message = "x" * 260 + key  # a cut at 300 characters leaves half of it
            return status, json.dumps({"error": {"message": message}})
        message = {"content": f"{key} it is. So the answer is yes.", "reasoning_content": key}
        choice = {"message": message, "finish_reason": f"stop {key}"}
        return 200, completion("", model=f"m {key}", choices=[choice])

    with answering(answer) as url:
        status, printed = ask(dslt, url, "--max_attempts", "3")
    assert status == 0 and set(seen) == {KEY}
    assert "***" in (table / "out/records/completions.jsonl").read_text()
    assert_no_secret(table, printed)


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_an_endpoint_that_refuses_the_key_shows_it_in_vain(table, dslt, status):
    def answer(body, authorization):
        error = {"message": f"wrong key {authorization}", "code": "insufficient_quota"}
        return status, json.dumps({"error": error})

    with answering(answer) as url:
        found, printed = ask(dslt, url)
    assert found == 2 and "***" in printed and "Traceback" not in printed
    assert_no_secret(table, printed)


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@localhost:9/v1",
        f"http://{KEY}@localhost:9/v1",
        f"http://localhost:9/v1?key={KEY}",
        f"ftp://user:{KEY}@localhost/v1",
        f"//{KEY}@localhost/v1",
        f"http://[{KEY}@::1/v1",
        f"http://localhost:9/v1#{KEY}",
    ],
)
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_an_address_that_holds_a_key_is_refused_and_not_shown(by, url):
    given = {"base_url": url} if by == "flag" else {}
    teacher = EndpointTeacher("m", model="m", prompt=load_prompt("generic"), **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", url if by == "environment" else "")
        with pytest.raises(InputError) as caught:
            read_key(teacher)
    assert KEY not in str(caught.value) and "alone, in the variable" in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"{KEY}\x00", f"{KEY}é"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key):
    teacher = EndpointTeacher("m", model="m", prompt=load_prompt("generic"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {"OPENAI_API_KEY": key})
        with pytest.raises(InputError, match="no HTTP header") as caught:
            read_key(teacher)
        assert KEY not in str(caught.value)
