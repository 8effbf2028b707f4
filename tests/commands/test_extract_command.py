"""`dslt extract` through the command line, against a server on a real socket."""

import argparse
import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from dslt.commands.extract import READ_BY, TEACHER_FLAGS, USED_BY, add_problem_flags
from dslt.main import main
from dslt.records import Example, read_examples
from dslt.teacher.prompts import load_prompt, prompt_of

sys.path.insert(0, str(Path(__file__).parents[1] / "teacher"))
from fault_server import serving

pytest.importorskip("openai", reason="the openai library is not installed (extra `teacher`)")

# The README's recipes for a table of one's own.
NLI_RECIPE = """
dslt extract --dataset claims --input_file claims.csv --input_column premise
  --input_column hypothesis --label_column label --prompt nli
  --teacher endpoint --base_url http://localhost:8000/v1 --model MODEL
  --samples 3 --max_rationales 2 --retry_with_hint --output_dir runs/claims/records
"""
FREE_TEXT_RECIPE = """
dslt extract --dataset reviews --input_file reviews.csv --input_column review
  --label_column mood --label entailment --label neutral --label contradiction
  --teacher endpoint --base_url http://localhost:8000/v1 --model MODEL
  --output_dir runs/reviews/records
"""
LABELS = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("recipe", [NLI_RECIPE, FREE_TEXT_RECIPE])
def test_the_recipes_are_those_of_the_readme(recipe):
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    assert " ".join(recipe.split()) in " ".join(readme.replace("\\\n", " ").split())


@pytest.fixture(scope="module")
def base_url():
    with serving() as url:
        yield url


def run_recipe(recipe, base_url, *more):
    words = shlex.split(recipe)[1:]
    return main(
        [base_url if word == "http://localhost:8000/v1" else word for word in [*words, *more]]
    )


def write_table(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_claims(path, rows=30):
    table = [
        (f"there are {n} cups .", f"there are {n % 7} cups .", LABELS[n % 3]) for n in range(rows)
    ]
    write_table(path, ("premise", "hypothesis", "label"), table)


def rows_of(path):
    return [json.loads(line) for line in Path(path).open()]


def test_inference_from_a_table_of_ones_own(tmp_path, base_url, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_claims(tmp_path / "claims.csv")
    assert run_recipe(NLI_RECIPE, base_url) == 0
    records = list(read_examples("runs/claims/records/records.jsonl"))
    assert len(records) == 30 and sum(r.split == "validation" for r in records) == 3
    assert records[0].input == "premise: there are 0 cups . hypothesis: there are 0 cups ."
    assert all(r.teacher_label in LABELS and r.teacher == "MODEL" for r in records)
    hinted = [r for r in records if r.is_hinted or any(m.is_hinted for m in r.more_rationales)]
    assert hinted and all(r.split == "train" for r in hinted)
    assert all(r.teacher_label != r.label for r in hinted)
    prompts = list(Path("runs/claims/records/prompts").iterdir())
    assert [path.stem for path in prompts] == [records[0].prompt]
    out = capsys.readouterr().out
    assert "MODEL: asked" in out and "→ kept" in out

    # Another filter takes what is stored: the server is not needed any more.
    assert run_recipe(NLI_RECIPE, "http://127.0.0.1:9/v1", "--keep", "gold") == 0
    out = capsys.readouterr().out
    assert "sent" not in out and "not the gold answer" in out
    assert "the records that were here before are now" in out


def test_free_text_from_a_table_of_ones_own(tmp_path, base_url, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        (f'It was, "well", {n} times {{input}} good.', LABELS[n % 3] if n % 2 else "")
        for n in range(20)
    ]
    write_table(tmp_path / "reviews.csv", ("review", "mood"), rows)
    assert run_recipe(FREE_TEXT_RECIPE, base_url) == 0
    closed = list(read_examples("runs/reviews/records/records.jsonl"))
    assert sum(r.label is None for r in closed) == 10 and all(r.rationale for r in closed)
    open_recipe = FREE_TEXT_RECIPE.replace("--label ent", "--name open --label ent")
    words = shlex.split(open_recipe)
    while "--label" in words:
        at = words.index("--label")
        del words[at : at + 2]
    assert run_recipe(shlex.join(words), base_url) == 0  # another prompt: asked anew
    opened = list(read_examples("runs/reviews/records/records.jsonl"))
    assert {r.teacher for r in opened} == {"open"} and all(r.teacher_label for r in opened)
    assert opened[0].prompt != closed[0].prompt


def test_a_dry_run_shows_the_prompt_and_the_price_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_claims(tmp_path / "claims.csv")
    prices = ["--price_input", "3", "--price_output", "15"]
    assert run_recipe(NLI_RECIPE, "http://127.0.0.1:9/v1", "--dry_run", *prices) == 0
    out = capsys.readouterr().out
    assert "Q: premise: there are 0 cups . hypothesis: there are 0 cups ." in out
    assert "requests: 90 for 90 answers" in out and "cost: about 0." in out
    assert [path.name for path in tmp_path.iterdir()] == ["claims.csv"]


def test_a_dry_run_counts_the_hinted_questions(tmp_path, base_url, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_claims(tmp_path / "claims.csv")
    dry_run = ["--dry_run", "--price_input", "0", "--price_output", "1e6"]
    assert run_recipe(NLI_RECIPE, base_url, *dry_run) == 0
    out = capsys.readouterr().out
    assert (
        "hinted, should all answers be wrong: at most 27 more requests" in out
    )  # of 30, 3 held out
    assert f"at most {(90 + 27) * 512:,}.00" in out

    assert run_recipe(NLI_RECIPE.replace("--retry_with_hint", ""), base_url) == 0
    assert run_recipe(NLI_RECIPE, base_url, *dry_run) == 0
    out = capsys.readouterr().out
    assert "Hint: the answer is" in out and "at most 27" not in out
    planned = int(re.search(r"requests: (\d+) for", out)[1])
    assert run_recipe(NLI_RECIPE, base_url) == 0
    assert f"sent {planned} requests" in capsys.readouterr().out and planned > 0
    assert run_recipe(NLI_RECIPE, base_url, *dry_run) == 0
    assert "nothing to ask" in capsys.readouterr().out


def test_shards_are_asked_apart_and_merged(tmp_path, base_url, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_claims(tmp_path / "claims.csv")

    def shard(number):
        recipe = NLI_RECIPE.replace("runs/claims/records", f"shard{number}")
        return run_recipe(recipe, base_url, "--shard", f"{number}/3")

    merge = [part for n in (1, 2, 3) for part in ("--merge_from", f"shard{n}")]
    assert shard(1) == shard(2) == 0
    assert run_recipe(NLI_RECIPE, base_url, *merge[:4]) == 2
    assert "finish every shard" in capsys.readouterr().err
    assert shard(3) == 0
    assert run_recipe(NLI_RECIPE, base_url, *merge) == 0
    merged = Path("runs/claims/records/records.jsonl").read_text()
    assert run_recipe(NLI_RECIPE.replace("runs/claims/records", "whole"), base_url) == 0
    assert merged == Path("whole/records.jsonl").read_text()


def test_the_batch_format_out_and_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_claims(tmp_path / "claims.csv", rows=10)
    recipe = NLI_RECIPE.replace("--retry_with_hint", "")
    assert run_recipe(recipe, "http://127.0.0.1:9/v1", "--write_batch", "requests.jsonl") == 0
    requests = rows_of("requests.jsonl")
    assert len(requests) == 30 and requests[0]["body"]["model"] == "MODEL"
    message = {"message": {"content": "A cup. So the answer is neutral."}}
    results = [
        {
            "custom_id": row["custom_id"],
            "response": {"status_code": 200, "body": {"choices": [message]}},
        }
        for row in requests[:-3]
    ]
    Path("results.jsonl").write_text("\n".join(map(json.dumps, results)))
    assert run_recipe(recipe, "http://127.0.0.1:9/v1", "--read_batch", "results.jsonl") == 0
    out = capsys.readouterr().out
    assert "27 new answers" in out
    assert "3 questions have no answer; the same command without --read_batch asks them" in out
    assert run_recipe(recipe, "http://127.0.0.1:9/v1", "--write_batch", "rest.jsonl") == 0
    assert [row["custom_id"] for row in rows_of("rest.jsonl")] == [
        row["custom_id"] for row in requests[-3:]
    ]


def test_a_run_without_one_answer_fails_and_leaves_the_records(
    tmp_path, base_url, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_claims(tmp_path / "claims.csv", rows=10)
    assert run_recipe(NLI_RECIPE, base_url) == 0
    records = Path("runs/claims/records/records.jsonl")
    before = records.read_bytes()
    capsys.readouterr()
    unlucky = ["--model", "other", "--max_attempts", "1"]
    assert run_recipe(NLI_RECIPE, "http://127.0.0.1:9/v1", *unlucky) == 2
    assert "none of 30 questions has an answer; connection lost: 30" in capsys.readouterr().err
    assert run_recipe(NLI_RECIPE, base_url, "--model", "another", "--offline") == 2
    err = capsys.readouterr().err
    assert "not asked: 30" in err and "the same command without --offline again" in err
    assert [path.name for path in records.parent.glob("records*")] == ["records.jsonl"]
    assert records.read_bytes() == before
    assert run_recipe(NLI_RECIPE, base_url, *unlucky) == 0


def test_several_teachers_side_by_side(tmp_path, capsys):
    teachers = [
        {"name": "careful", "weight": 0.75, "samples": 2},
        {"name": "careless", "weight": 0.25, "mistake_rate": 1.0},
    ]
    (tmp_path / "teachers.json").write_text(json.dumps(teachers))
    sizes = [
        "--train",
        "12",
        "--validation",
        "0",
        "--test",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags = ["--teacher", "scripted", "--teachers", str(tmp_path / "teachers.json")]
    assert main(["extract", "--dataset", "facts", *flags, *sizes, "--keep", "legal"]) == 0
    for record in read_examples(tmp_path / "out" / "records.jsonl"):
        assert record.teacher_label == record.label
        assert [(r.teacher, r.weight) for r in record.rationales()] == [
            ("careful", 0.75), ("careless", 0.25),
        ]  # fmt: skip
    assert "careless: asked 12 → answered 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--teacher", "endpoint"], "--model is missing"),
        (["--teacher", "endpoint", "--model", "m", "--prompt", "x"], "there is no such prompt"),
        (["--teacher", "endpoint", "--model", "m", "--extra_body", "["], "no JSON"),
        (
            ["--teacher", "endpoint", "--model", "m", "--extra_body", '{"seed": "x"}'],
            "expected a whole number",
        ),
        (
            ["--teacher", "endpoint", "--model", "m", "--api_key_env", "NO_SUCH"],
            "NO_SUCH is not set",
        ),
        (["--teacher", "scripted", "--shard", "3/2"], "such as 1/4"),
        (["--teacher", "scripted", "--weight", "-1"], "weight is -1"),
        (
            ["--teacher", "scripted", "--weight", "1e7"],
            "weight is 10000000.0; expected",
        ),
        (["--teacher", "released", "--data_dir", "x", "--shard", "1/2"], "without --shard"),
        (["--teacher", "scripted", "--rationale_column", "why"], "expected one of the two"),
        (["--teacher", "scripted", "--max_similarity", "2"], "max_similarity is 2.0"),
        (["--teacher", "scripted", "--teachers", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said_without_a_traceback(
    tmp_path, capsys, monkeypatch, flags, says
):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    sizes = ["--train", "3", "--validation", "0", "--test", "0", "--output_dir", str(tmp_path)]
    assert main(["extract", "--dataset", "facts", *flags, *sizes]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--label", "yes", "--label", "no"],
        ["--samples", "4", "--keep", "gold", "--price_input", "3", "--max_rationales", "5"],
        ["--mistake_rate", "0.3", "--wording", "1"],
        ["--model", "m", "--dry_run", "--concurrency", "2"],
    ],
)
def test_what_only_a_teacher_needs_is_refused_without_one(tmp_path, capsys, flags):
    out = tmp_path / "records"
    sizes = ["--train", "3", "--validation", "0", "--test", "0", "--output_dir", str(out)]
    assert main(["extract", "--dataset", "facts", *flags, *sizes]) == 2
    names = {word for word in flags if word.startswith("--")}
    named, _, said = capsys.readouterr().err.removeprefix("dslt extract: ").partition(" given, ")
    assert set(named.split(", ")) == names and said.startswith("but no teacher; expected")
    assert not out.exists()
    assert main(["extract", "--dataset", "facts", *sizes]) == 0


@pytest.mark.parametrize(
    ("teacher", "flags", "wanted"),
    [
        ("scripted", ["--model", "m", "--temperature", "0.1"], "endpoint"),
        ("scripted", ["--base_url", "http://127.0.0.1:9/v1", "--concurrency", "2"], "endpoint"),
        ("scripted", ["--retry_with_hint", "--write_batch", "requests.jsonl"], "endpoint"),
        ("released", ["--samples", "3"], "scripted or endpoint"),
        ("released", ["--price_input", "3", "--label", "yes"], "endpoint"),
        ("released", ["--mistake_rate", "0.3"], "scripted"),
        ("endpoint", ["--mistake_rate", "0.3", "--wording", "1"], "scripted"),
        ("released", ["--mistake_rate", "0.3", "--model", "m"], ""),
    ],
)
def test_what_another_kind_of_teacher_needs_is_refused(tmp_path, capsys, teacher, flags, wanted):
    out = tmp_path / "records"
    sizes = ["--train", "3", "--validation", "0", "--test", "0", "--output_dir", str(out)]
    assert main(["extract", "--dataset", "facts", "--teacher", teacher, *flags, *sizes]) == 2
    said = capsys.readouterr().err.removeprefix("dslt extract: the command line: found ")
    named, _, said = said.partition(f", but a {teacher} teacher does not use them; ")
    assert set(named.split(", ")) == {word for word in flags if word.startswith("--")}
    expected = f"expected teacher {wanted} beside them, or " if wanted else ""
    assert said == f"{expected}leave them out\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "idle", "source", "wanted"),
    [
        (
            ["facts", "--input_column", "q", "--label_column", "a", "--answer_form", "equation"],
            "--input_column, --label_column, --answer_form", "embedded", "--input_file with",
        ),
        (["sums", "--tfds"], "--tfds", "embedded", "a dataset of TFDS with"),
        (["facts", "--data_dir", "x", "--teacher", "scripted"], "--data_dir", "embedded", "TFDS"),
        (["facts", "--validation_fraction", "0.2"], "--validation_fraction", "embedded", ""),
        (
            ["mine", "--input_file", "mine.csv", "--train", "9", "--facts", "2"],
            "--train, --facts", "table", "an embedded dataset",
        ),
        (["mine", "--input_file", "m.csv", "--tfds", "--test", "9"], "--tfds, --test", "table", ""),
        (["cqa", "--tfds", "--id_column", "id"], "--id_column", "TFDS", "--input_file"),
        (["svamp", "--data_dir", "x", "--train", "9"], "--train", "released", "an embedded"),
    ],
)  # fmt: skip
def test_what_another_source_of_problems_reads_is_refused(
    tmp_path, capsys, args, idle, source, wanted
):
    out = tmp_path / "records"
    assert main(["extract", "--dataset", *args, "--output_dir", str(out)]) == 2
    said = capsys.readouterr().err
    assert f": found {idle}, but the problems of dataset '{args[0]}' are {source} ones" in said
    assert wanted in said and said.endswith("leave them out\n") and not out.exists()


def test_the_released_teacher_reads_its_completions_beside_a_table(tmp_path, capsys):
    teachers = tmp_path / "teachers.json"
    teachers.write_text(json.dumps([{"teacher": "released"}]))
    for flags in (["--teacher", "released"], ["--teachers", str(teachers)]):
        args = ["--dataset", "svamp", "--input_file", "none.csv", *flags, "--data_dir", "x"]
        assert main(["extract", *args, "--output_dir", str(tmp_path / "out")]) == 2
        assert "none.csv: no input column is named" in capsys.readouterr().err


def test_what_one_kind_of_teacher_or_problems_uses_are_flags():
    parser = argparse.ArgumentParser()
    for add_flags in (*TEACHER_FLAGS, add_problem_flags):
        add_flags(parser)
    assert USED_BY.keys() | READ_BY.keys() <= vars(parser.parse_args([])).keys()


def test_each_teacher_of_a_file_is_told_what_it_uses(tmp_path, capsys):
    """A flag is for those that use it; a field of the file is for its own teacher."""
    path = tmp_path / "teachers.json"
    sizes = ["--train", "3", "--validation", "0", "--test", "0"]
    flags = ["--model", "m", "--mistake_rate", "0.5", "--dry_run", *sizes]
    flags += ["--teachers", str(path), "--output_dir", str(tmp_path / "records")]
    teachers = [{"teacher": "scripted"}, {"teacher": "endpoint", "temperature": 0.1}]
    path.write_text(json.dumps(teachers))
    assert main(["extract", "--dataset", "facts", *flags]) == 0
    path.write_text(json.dumps([teachers[0]]))
    assert main(["extract", "--dataset", "facts", *flags]) == 2
    assert "found --model, but a scripted teacher does not" in capsys.readouterr().err
    path.write_text(json.dumps([teachers[1], teachers[0] | {"temperature": 0.1}]))
    assert main(["extract", "--dataset", "facts", *flags]) == 2
    error = capsys.readouterr().err
    assert f"{path}: teacher 1: found temperature, but a scripted teacher does not" in error


def test_what_is_not_asked_about_stays_in_the_records(tmp_path, capsys):
    sizes = ["--train", "9", "--validation", "3", "--test", "3", "--output_dir", str(tmp_path)]
    flags = ["--teacher", "scripted", "--limit", "5", "--ask_split", "train"]
    assert main(["extract", "--dataset", "facts", *flags, *sizes]) == 0
    records = list(read_examples(tmp_path / "records.jsonl"))
    assert [bool(r.rationale) for r in records] == [True] * 5 + [False] * 10
    assert all(r.label for r in records)
    splits = json.loads((tmp_path / "summary.json").read_text())["splits"]
    assert [(s["not_asked"], s["accuracy"]["total"]) for s in splits] == [(4, 5), (3, 0), (3, 0)]
    assert not (tmp_path / "rejected.jsonl").read_text()
    out = capsys.readouterr().out
    assert "4 not asked" in out and out.count("  not asked\n") == 2
    assert "no gold label" not in out


@pytest.mark.parametrize(("name", "dataset"), [("anli", "anli1"), ("cos_e", "cqa")])
def test_what_tfds_calls_a_dataset_gets_the_prompt_of_the_dataset(
    tmp_path, monkeypatch, capsys, name, dataset
):
    asked = []

    def read_tfds(dataset, data_dir):
        asked.append(dataset)
        return [Example(f"{dataset}-{n}", dataset, "train", f"problem {n}") for n in range(20)]

    monkeypatch.setattr("dslt.data.datasets.read_tfds", read_tfds)
    flags = ["--teacher", "endpoint", "--model", "m", "--dry_run", "--output_dir", str(tmp_path)]
    assert main(["extract", "--dataset", name, "--tfds", *flags]) == 0
    shown = capsys.readouterr().out
    assert main(["extract", "--dataset", dataset, "--tfds", *flags]) == 0
    assert asked == [dataset, dataset] and shown == capsys.readouterr().out
    assert load_prompt(prompt_of(dataset)).instruction.strip() in shown


def test_a_tables_own_explanations_are_never_dropped_for_a_teachers(tmp_path, base_url, capsys):
    table = tmp_path / "mine.csv"
    write_table(table, ("q", "why"), [(f"what is {n} ?", f"because {n}") for n in range(20)])
    flags = ["--input_file", str(table), "--input_column", "q", "--rationale_column", "why"]
    flags += ["--teacher", "endpoint", "--model", "m", "--base_url", base_url]
    out = tmp_path / "records"
    assert main(["extract", "--dataset", "mine", *flags, "--output_dir", str(out)]) == 2
    assert "--rationale_column is 'why' beside a teacher" in capsys.readouterr().err
    assert not out.exists()


def test_equations_are_never_compared_as_text(tmp_path, capsys):
    table = tmp_path / "mine.csv"
    write_table(table, ("q", "a"), [(f"half of {n} ?", n / 2) for n in range(20)])
    flags = ["--input_file", str(table), "--input_column", "q", "--label_column", "a"]
    flags += ["--teacher", "endpoint", "--model", "m", "--base_url", "http://127.0.0.1:9/v1"]
    flags += ["--dry_run", "--output_dir", str(tmp_path / "records")]
    assert main(["extract", "--dataset", "mine", *flags, "--prompt", "equation"]) == 2
    assert "expected --answer_form equation" in capsys.readouterr().err
    assert main(["extract", "--dataset", "svamp", *flags]) == 2  # its prompt asks for equations
    equations = ["--prompt", "equation", "--answer_form", "equation"]
    assert main(["extract", "--dataset", "mine", *flags, *equations]) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", "-1"], "argument --seed: invalid natural value: '-1'"),
        (["--validation_fraction", "nan"], "the validation fraction is nan"),
    ],
)
def test_how_validation_is_held_out_is_checked(tmp_path, capsys, flags, says):
    table = tmp_path / "mine.csv"
    write_table(table, ("q",), [(f"what is {n} ?",) for n in range(20)])
    flags = ["--input_file", str(table), "--input_column", "q", *flags]
    try:
        status = main(["extract", "--dataset", "mine", *flags, "--output_dir", str(tmp_path)])
    except SystemExit as end:  # argparse's own
        status = end.code
    assert status == 2 and says in capsys.readouterr().err
