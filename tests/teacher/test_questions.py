import dataclasses
import json
import math

import pytest

from dslt.errors import InputError
from dslt.records import MAX_WEIGHT, Example
from dslt.teacher import batch_files
from dslt.teacher.batch_files import read_batch, write_batch
from dslt.teacher.panel import read_teachers
from dslt.teacher.prompts import load_prompt
from dslt.teacher.questions import (
    EndpointTeacher,
    is_in_shard,
    plan_questions,
    to_requests,
)
from dslt.teacher.shards import check_complete, merge_stores, parse_shard
from dslt.teacher.store import Answer, CompletionStore

EXAMPLES = [
    Example(f"e{number}", "esnli", "train", f"premise: {number} hypothesis: x", "neutral")
    for number in range(20)
]
TEACHER = EndpointTeacher("t", model="m", prompt=load_prompt("nli"), seed=5, samples=3)


def keys_of(teacher=TEACHER, examples=EXAMPLES, **options):
    rows = range(len(examples))
    return [question.key for question in plan_questions(examples, rows, teacher, **options)]


def test_a_key_depends_on_what_an_answer_depends_on_and_on_nothing_else():
    keys = keys_of()
    assert len(set(keys)) == len(keys) == 60
    same = [
        dataclasses.replace(TEACHER, **change)
        for change in (
            {"name": "other"}, {"base_url": "http://elsewhere/v1"}, {"weight": 2.0},
            {"api_key_env": "MINE"}, {"samples_per_request": 3},
        )
    ]  # fmt: skip
    assert all(keys_of(teacher) == keys for teacher in same)
    assert keys_of(dataclasses.replace(TEACHER, samples=2)) == [
        key for number, key in enumerate(keys) if number % 3 < 2
    ]
    changes = (
        {"model": "n"}, {"temperature": 0.1}, {"max_tokens": 9}, {"seed": 6},
        {"mode": "completion"}, {"extra_body": {"top_p": 0.5}}, {"prompt": load_prompt("generic")},
    )  # fmt: skip
    for change in changes:
        assert not set(keys_of(dataclasses.replace(TEACHER, **change))) & set(keys)
    assert not set(keys_of(is_hinted=True)) & set(keys)


def test_equal_problems_are_asked_once():
    twice = [EXAMPLES[0], dataclasses.replace(EXAMPLES[0], id="again")]
    questions = plan_questions(twice, range(2), dataclasses.replace(TEACHER, samples=1))
    assert len(questions) == 2 and len(list(to_requests(questions))) == 1


def test_a_request_of_several_samples_carries_their_number_and_the_first_seed():
    teacher = dataclasses.replace(TEACHER, samples_per_request=2)
    requests = list(to_requests(plan_questions(EXAMPLES[:2], range(2), teacher)))
    assert [len(request.keys) for request in requests] == [2, 1, 2, 1]
    assert [request.body.get("n") for request in requests] == [2, None, 2, None]
    assert [request.body["seed"] for request in requests] == [5, 7, 5, 7]


def test_teachers_are_checked():
    for weight in (0, 5e-324, 1e7, math.nan):
        with pytest.raises(InputError, match="expected at least 1e-06, at most 1,000,000"):
            dataclasses.replace(TEACHER, weight=weight)
    dataclasses.replace(TEACHER, weight=MAX_WEIGHT)
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"temperature is {temperature}"):
            dataclasses.replace(TEACHER, temperature=temperature)
    with pytest.raises(InputError, match="samples_per_request is 0; expected above 0"):
        dataclasses.replace(TEACHER, samples_per_request=0)
    with pytest.raises(InputError, match="max_tokens is -4; expected above 0"):
        dataclasses.replace(TEACHER, max_tokens=-4)
    for body, says in (
        ({"messages": [1]}, "extra_body has messages; the prompt"),
        ({"prompt": None, "n": 3}, "extra_body has prompt, n; the prompt"),
        ({"seed": True}, "extra_body has the seed True; expected a whole number"),
        ({"x": [math.nan]}, r"extra_body is {'x': \[nan\]}; expected JSON"),
    ):
        with pytest.raises(InputError, match=says):
            dataclasses.replace(TEACHER, extra_body=body)
    with pytest.raises(InputError, match="mode is 'talk'"):
        dataclasses.replace(TEACHER, mode="talk")
    with pytest.raises(InputError, match="has no model"):
        dataclasses.replace(TEACHER, model="")


def result(key, text="Why. So the answer is neutral.", status=200):
    message = {"message": {"content": text}, "finish_reason": "stop"}
    body = {"model": "m-1", "choices": [message], "usage": {"prompt_tokens": 3}}
    return {"custom_id": key, "response": {"status_code": status, "body": body}, "error": None}


def test_the_files_of_a_batch_appear_whole_or_not_at_all(small_disk, monkeypatch):
    monkeypatch.setattr(batch_files, "MAX_REQUESTS", 10)
    disk, resize = small_disk("8k")
    questions = plan_questions(EXAMPLES, range(20), dataclasses.replace(TEACHER, samples=1))
    with pytest.raises(InputError, match="disk is full"):
        write_batch(to_requests(questions), str(disk / "requests.jsonl"))
    assert list(disk.iterdir()) == [] and resize("1m")
    paths = write_batch(to_requests(questions), str(disk / "requests.jsonl"))
    assert sorted(disk.iterdir()) == paths and len(paths) == 2


def test_batch_results_come_back_in_any_order_and_in_parts(tmp_path):
    teacher = dataclasses.replace(TEACHER, samples=1)
    questions = plan_questions(EXAMPLES, range(20), teacher)
    (path,) = write_batch(to_requests(questions), str(tmp_path / "requests.jsonl"))
    rows = [json.loads(line) for line in path.open()]
    assert rows[3]["method"] == "POST" and rows[3]["url"] == "/v1/chat/completions"
    assert rows[3]["body"] == questions[3].body
    with pytest.raises(InputError, match="is there already"):
        write_batch(to_requests(questions), str(path))

    keys = [row["custom_id"] for row in rows]
    parts = [
        [result(key) for key in reversed(keys[10:])],
        [
            result(keys[0]),
            result(keys[0], "again"),
            result("stranger"),
            result(keys[1], status=500),
        ],
    ]
    for number, part in enumerate(parts):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, part)))
    with CompletionStore(tmp_path / "out") as store:
        for number, expected in enumerate(
            [(10, {}), (1, {"answered before": 1, "of another job": 1, "failed": 1})]
        ):
            results = read_batch([str(tmp_path / f"{number}.jsonl")], store, set(keys))
            assert (results.answers, results.unused) == expected
        assert store.answers[keys[0]] == Answer(
            "Why. So the answer is neutral.", "m-1", None, "stop", 3
        )
        assert store.answers.keys() == {keys[0], *keys[10:]} and keys[1] in store.failures


def test_what_is_no_batch_result_is_named_with_its_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"custom_id": "a"}\n{"id": 1}\n')
    with CompletionStore(tmp_path) as store, pytest.raises(InputError, match=r"r\.jsonl:2: has no"):
        read_batch([str(path)], store, set())


def test_every_example_is_in_one_shard_and_equal_inputs_in_the_same():
    for count in (1, 3, 7):
        for example in EXAMPLES:
            homes = [i for i in range(1, count + 1) if is_in_shard(example, (i, count))]
            assert len(homes) == 1
            copy = dataclasses.replace(example, id="copy", split="test")
            assert is_in_shard(copy, (homes[0], count))
    assert parse_shard("2/3") == (2, 3)
    for bad in ("0/3", "4/3", "1", "a/b", "-1/3", "1/" + "9" * 5000):
        with pytest.raises(InputError, match="such as 1/4"):
            parse_shard(bad)


def test_merging_joins_the_shards_and_misses_what_is_not_there(tmp_path):
    questions = plan_questions(EXAMPLES, range(20), dataclasses.replace(TEACHER, samples=1))
    halves = {"a": questions[:10], "b": questions[10:19]}
    for name, half in halves.items():
        with CompletionStore(tmp_path / name) as store:
            for question in half[:-1]:
                store.add_answer(question.key, Answer(name))
            store.add_failure(half[-1].key, "500")
    ids = [example.id for example in EXAMPLES]
    with CompletionStore(tmp_path / "all") as store:
        taken = merge_stores(store, [tmp_path / "a", tmp_path / "b"])
        assert list(taken.values()) == [9, 8]
        assert list(merge_stores(store, [tmp_path / "a"]).values()) == [0]  # again changes nothing
        check_complete(questions[:19], store, ids)
        with pytest.raises(InputError, match=r"1 of 20 questions .* of 1 examples \(e19\)"):
            check_complete(questions, store, ids)
        with pytest.raises(InputError, match="nowhere: has no completions"):
            merge_stores(store, [tmp_path / "nowhere"])


def test_a_list_of_teachers_is_checked(tmp_path):
    path = tmp_path / "teachers.json"
    fields = ("name", "weight", "samples", "extra_body")
    path.write_text('[{"name": "a", "weight": 1, "extra_body": {"top_p": null}}]')
    expected = [{"name": "a", "weight": 1, "extra_body": '{"top_p": null}'}]
    assert read_teachers(str(path), fields) == expected
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_teachers(str(path), fields) == expected
    for text, says in (
        ("[", "cannot be read"),
        ("{}", "no list of teachers"),
        ('[{"weigth": 1}]', "teacher 0: unknown field 'weigth'"),
        ('[{}, {"samples": 1.5}]', "teacher 1: samples is 1.5; expected a int"),
    ):
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_teachers(str(path), fields)
        assert says in str(caught.value)
