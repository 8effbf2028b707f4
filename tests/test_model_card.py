"""The model card says what the run knows, calls the rest unknown, and cannot be broken out of."""

import hashlib
from pathlib import Path

import pytest

from dslt.model_card import UNKNOWN, escape, summarise_records, write_card
from dslt.records import Example, Rationale, write_rows
from dslt.workdir import RunDir, StudentFormat, write_json, write_json_rows

HOSTILE = 'evil\n---\nlicense: mit\n# ![x](http://e.com/x.png) <script>alert(1)</script> | `a` "b"'


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run's directory without its checkpoints."""
    run = RunDir(tmp_path / "run")
    rationales = {"rationale": "Because.", "teacher": "palm", "prompt": "nli"}
    more = (Rationale("Also.", teacher=HOSTILE),)
    rows = [
        Example("a", "esnli", "train", "p", "yes", "yes", **rationales, more_rationales=more),
        Example("b", "esnli", "train", "p", "yes"),
        Example("c", "esnli", "test", "p", "no"),
    ]
    records = tmp_path / "records.jsonl"
    write_rows(records, rows)
    digest = hashlib.sha256(records.read_bytes()).hexdigest()
    run.path.mkdir()
    write_json(
        run.info,
        {"rationale_weight": 0.5, "num_params": 12, "seed": 3, "records": {str(records): digest}},
    )
    run.config.write_text(
        "# pipeline.DataConfig.label_source = 'gold'\n"
        "pipeline.DataConfig.label_source = \\\n    'teacher'\n"
        "pipeline.DataConfig.records = \\\n    ('a',\n     'b')\n"
        "pipeline.DataConfig.batch_examples = 64\n"
        "train.TrainConfig.init_from = None\n"
        "train.TrainConfig.odd = @a_reference\n"
    )
    row = {"test/accuracy": 0.75, "test/standard_error": 0.25, "test/examples": 4}
    write_json_rows(run.evaluations, [{"step": 5, **row}, {"step": 10}])
    return run


def test_the_card_says_what_the_run_knows(run):
    card = write_card("student", run, 5, StudentFormat())
    assert "| method | distilling step\\-by\\-step: the teacher's labels and rationales |" in card
    assert "| λ \\(rationale\\_weight\\) | 0\\.5 |" in card
    assert "| examples a step | 64 |" in card and "| seed | 3 |" in card
    assert "| starts from | random weights |" in card and "| checkpoint | step 5 |" in card
    assert "| test | 75.0 % | 25.0 | 4 |" in card
    assert "esnli, train: 2 examples" in card and "teacher palm: 1 rationales" in card
    assert "Licence of the student: *to be filled in*" in card


@pytest.mark.parametrize(
    ("weight", "settings", "expected"),
    [
        (0.0, "pipeline.DataConfig.target_layout = 'rationale_label'", "rationale, then its label"),
        (0.0, "pipeline.DataConfig.target_layout = 'label_rationale'", "label, then its rationale"),
        (0.0, "pipeline.DataConfig.target_layout = 'rhyme'", "| method | unknown |"),
        (1.0, "pipeline.DataConfig.shared_encoder = True", "one encoder pass"),
        (1.0, "pipeline.DataConfig.shuffle_rationales = True", "each rationale another example"),
        (1.0, "train.TrainConfig.consistency_weight = 0.1", "a consistency term of weight 0"),
        (1.0, "pipeline.DataConfig.train_fraction = 0.25", "| share of the train split | 0\\.25 |"),
    ],
)
def test_the_card_tells_methods_and_shares_of_the_data_apart(run, weight, settings, expected):
    write_json(run.info, {"rationale_weight": weight})
    assert expected not in write_card("student", run, 5, StudentFormat())
    run.config.write_text(run.config.read_text() + settings + "\n")
    assert expected in write_card("student", run, 5, StudentFormat())


def test_the_card_of_a_branch_says_where_it_branched(run):
    run.update_info(branched_from={"checkpoints": "runs/first", "step": 30})
    card = write_card("student", run, 5, StudentFormat())
    assert "| starts from | step 30 of runs/first |" in card and "random weights" not in card


def test_what_nobody_knows_is_unknown(run):
    card = write_card("student", None, None, StudentFormat())
    assert card.count(UNKNOWN) > 8 and "model-index" not in card
    assert f"Accuracy: {UNKNOWN}" in card and f"- teacher: {UNKNOWN}" in card
    assert f"| starts from | {UNKNOWN} |" in card and f"| method | {UNKNOWN} |" in card
    assert "Accuracy: unknown" in write_card("student", run, 10, StudentFormat())  # not judged


def test_records_that_changed_say_nothing(run):
    (records,) = run.path.parent.glob("records.jsonl")
    records.write_text(records.read_text().replace("palm", "mine"))
    card = write_card("student", run, 5, StudentFormat())
    assert "the file is gone or has changed since" in card and "mine" not in card
    assert summarise_records(str(records.with_name("none")), "") is None


@pytest.mark.parametrize("name", ["student", HOSTILE, "---", "a: b # c"])
def test_hugging_face_reads_the_metadata(run, name, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    format = StudentFormat(input_prefix_label='```\n" + evil()')
    text = write_card(name, run, 5, format)
    card = hub.ModelCard(text)
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("unknown", "transformers")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    assert (result.dataset_name, result.dataset_split) == ("esnli", "test")
    assert "<script" not in card.text and "](http://e.com" not in card.text
    assert card.text.count("```") == 2  # the one code block
    assert card.text.count("\n# ") == 1
    compile(card.text.split("```")[1].removeprefix("python"), "card", "exec")


def test_escaped_text_is_one_line_without_markup():
    assert escape("a\nb|c") == "a b\\|c"
    assert escape("<b>") == "&lt;b&gt;"
    assert Path("x").name == escape("x")
