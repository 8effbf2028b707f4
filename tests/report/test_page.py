"""The whole report from run directories: what stands in it, and that hostile runs stay text."""

import base64
import csv
import dataclasses
import html.parser
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from made_runs import changed, make_rows, make_run, make_sweep

from dslt.main import main
from dslt.report import tables
from dslt.report.browser import browser_data
from dslt.report.page import write_report
from dslt.report.runs import read_run

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "</script><!--<script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"'&amp;{{7*7}}"
)


class Elements(html.parser.HTMLParser):
    """The tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


def unpack(page: str) -> dict:
    found = re.search(r'<script type="text/plain" id="data">([A-Za-z0-9+/=]*)</script>', page)
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    make_sweep(
        directory / "sweep", seeds=2, fractions=(0.25, 1.0),
        models=(("small", 1000), ("large", 9000)),
    )  # fmt: skip
    make_run(directory / "sweep" / "stopped", state="stopped")
    (directory / "sweep" / "nothing").mkdir()
    output = directory / "sweep" / "report"
    assert main(["report", str(directory / "sweep"), "--output_dir", str(output)]) == 0
    return output


def test_the_figures_of_accuracy_are_files_too(written):
    for name in ("accuracy_by_data.svg", "accuracy_by_model.svg"):
        assert (written / name).read_text().startswith("<svg ")
        assert f"]({name})" in (written / "report.md").read_text()


def test_the_findings_say_with_how_little_data_a_method_is_as_good_or_that_it_is_not(
    tmp_path,
):
    sweep = make_sweep(tmp_path / "sweep", seeds=2)
    found = write_report([sweep], tmp_path / "a").findings
    assert re.search(
        r"^facts: 25 % of the data is enough for step-by-step \(.* fine-tuning", found[1]
    )
    found = write_report([sweep], tmp_path / "b", "step-by-step").findings
    assert found[1].startswith(
        "facts: with less than all of the data no other method reaches step-by-step on all of it ("
    )


def test_the_page_is_alone_and_whole(written):
    page = (written / "index.html").read_text()
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert not {"src", "action", "srcset", "data"} & attributes.keys(), (tag, attributes)
        href = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert href.startswith("#") or href == "data:,"
    assert not re.search(r"@import|url\((?!#)", page)
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {h["href"][1:] for t, h in elements.tags if t == "a"} <= set(ids)
    assert "step-by-step on 100 % of the data" in elements.text
    assert "teacher 70.0" in elements.text  # inside a picture
    for name in ("fine_tuning-0.25-large-s1", "stopped", "nothing", "is empty", "was stopped"):
        assert name in elements.text
    assert all("aria-label" in a for t, a in elements.tags if a.get("role") in ("img", "region"))


def test_every_figure_and_table_is_there(written):
    page = Elements((written / "index.html").read_text())
    panels = [a["aria-label"] for _, a in page.tags if a.get("role") == "img"]
    assert len([p for p in panels if p.startswith("Test accuracy")]) == 2 + 2  # models, fractions
    assert any(re.search(r"fine-tuning: 4\d\.\d ± \d\.\d at 25 %", p) for p in panels)
    for label in ("label loss", "rationale loss", "validation accuracy", "examples a second"):
        assert any(p.startswith(label) for p in panels)
    for name in ("accuracy", "groups", "smallest_data", "smallest_model", "paired_tests"):
        assert len((written / f"{name}.csv").read_text().splitlines()) > 2, name
    with (written / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 + 1
    # what differs has a column, what does not has none
    assert "rationale_weight" in rows[0] and "num_steps" not in rows[0]
    assert "variant" not in rows[0] or {row["variant"] for row in rows} == {""}
    markdown = (written / "report.md").read_text()
    assert "| facts | large | step-by-step |" in markdown and "| stopped | unfinished" in markdown


def test_the_same_runs_give_the_same_bytes(written, tmp_path):
    before = (written / "index.html").read_bytes()
    assert main(["report", str(written.parent), "--output_dir", str(written)]) == 0
    assert (written / "index.html").read_bytes() == before


def test_the_csv_says_what_the_figures_show(written):
    with (written / "groups.csv").open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if r["method"] == "step-by-step")
    with (written / "runs.csv").open(newline="") as file:
        tests = [
            float(r["test, %"])
            for r in csv.DictReader(file)
            if r["method"] == "step_by_step" and r["fraction"] == "0.25" and r["model"] == "small"
        ]
    assert 100 * float(row["test_accuracy"]) == pytest.approx(sum(tests) / 2, abs=0.05)
    assert (row["seeds"], row["teacher_accuracy"], row["parameters"]) == ("2", "0.7", "1000")


def test_the_browsers_data_points_back_at_the_predictions(tmp_path):
    rows = make_rows(3, 0.5)
    rows[1] = changed(rows[1:2], teacher_label=None, rationale=None, label=None)[0]
    runs = [read_run(make_run(tmp_path / name, r), name) for name, r in (("a", rows), ("b", rows))]
    data = browser_data(runs, ["a", "b"])
    strings, problems = data["strings"], data["problems"]
    assert len(problems["id"]) == len(rows) and data["runs"][0] == data["runs"][1] | {"title": "a"}
    of = data["runs"][0]
    for i, row in enumerate(rows):
        problem = of["problem"][i]
        assert strings[problems["input"][problem]] == row.input
        assert strings[of["answer"][i]] == row.prediction
        assert (of["key"][i] == of["teacher_key"][i]) == (row.prediction == row.teacher_label)
        if i != 1:
            assert strings[of["teacher_rationale"][i]] == row.teacher_rationale
            assert of["right"][i] == int(row.prediction == row.label)
            assert of["teacher_right"][i] == int(row.teacher_label == row.label)
    assert of["rationale"][1] == of["teacher_answer"][1] == problems["gold"][1] == -1
    assert of["right"][1] == of["teacher_right"][1] == -1
    assert len(strings) == len(set(strings))


def make_hostile_runs(path: Path) -> Path:
    """Every text that a run can hold is hostile."""
    rows = changed(
        make_rows(0, 0.5), prediction=HOSTILE, rationale=HOSTILE, teacher_rationale=HOSTILE,
        teacher_label=HOSTILE,
    )  # fmt: skip
    rows = [*changed(rows[:30], input=HOSTILE, label=HOSTILE), *rows[30:]]
    for number in range(2):
        experiment = {
            "method": f"=1+1{HOSTILE}", "fraction": 0.5 + number / 2, "model": f"{HOSTILE}$\\frac",
            "seed": HOSTILE, f"{HOSTILE}": f"|{number}\n# x", "lone": "\ud800\x1b[2J\0",
        }  # fmt: skip
        run = make_run(path / f"<b>{number}&amp;", rows, experiment=experiment)
        info = json.loads((run / "run.json").read_text())
        info |= {"devices": f"{HOSTILE}{number}", "commit": ["x", {"y": number}], "seed": None}
        (run / "run.json").write_text(json.dumps(info))
    make_run(path / "=stopped|<i>", state=HOSTILE)
    return path


def test_hostile_runs_stay_text(tmp_path):
    out = tmp_path / "out"
    report = write_report([make_hostile_runs(tmp_path / "runs")], out)
    page = (out / "index.html").read_text()
    elements = Elements(page)
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("script") == 2 and not {"img", "b", "i", "iframe"} & set(tags)
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert HOSTILE in elements.text and "{{7*7}}" in elements.text
    assert HOSTILE in unpack(page)["strings"]
    assert len(report.left_out) == 1 and "=stopped|<i>" in elements.text
    markdown = (out / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown
    widths = {}
    for line in markdown.splitlines():
        if line.startswith("|"):
            widths.setdefault(len(re.findall(r"(?<!\\)\|", line)), []).append(line)
    assert all(len(lines) > 2 for lines in widths.values())  # no row has cells of its own
    for path in out.glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.reader(file):
                assert not any(re.match(r"[=@|]|[-+](?!\d)", cell) for cell in row), path


def test_runs_without_anything_to_compare_still_make_a_page(tmp_path, capsys):
    runs = tmp_path / "runs"
    make_run(runs / "stopped", state="stopped", steps=())
    (runs / "begun").mkdir()
    (runs / "begun" / "run.json").write_text("{}")
    (runs / "broken").mkdir()
    (runs / "broken" / "experiment.json").write_text("[")
    assert main(["report", str(runs), "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "left out: stopped: unfinished" in said and "left out: broken: run.json is miss" in said
    page = Elements((tmp_path / "out" / "index.html").read_text())
    assert "stopped" in page.text and not any(a.get("id") == "accuracy" for _, a in page.tags)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "is no directory"),
        (["."], "holds no run"),
        (["run", "--reference", "x"], "'x'"),
    ],
)
def test_what_cannot_be_reported_is_said_without_a_traceback(
    tmp_path, monkeypatch, capsys, arguments, says
):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "run":
        make_run(tmp_path / "run")
    assert main(["report", *arguments, "--output_dir", "out"]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_runs_directory_is_no_place_for_a_report(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    before = sorted(run.iterdir())
    assert main(["report", str(tmp_path), "--output_dir", str(run)]) == 2
    assert f"{run}: is a run's directory; expected another" in capsys.readouterr().err
    assert sorted(run.iterdir()) == before


def test_without_its_libraries_the_command_names_the_extra(tmp_path):
    """As where dslt is installed without extras."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'sacrebleu' else find(name, *a)\n"
        "from dslt.main import main; sys.exit(main(['report', '.', '--output_dir', 'out']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "needs sacrebleu; install the extra: pip install" in run.stderr


def test_small_numbers_read_well():
    assert [tables.p_text(p) for p in (None, 0.0004, 0.0312)] == [None, "< 0.001", "0.031"]
    assert (tables.percent(-0.0123, "+"), tables.percent(0.7)) == ("−1.2", "70.0")
    assert [tables.share_text(f) for f in (0.125, 1.0, 1 / 3)] == ["12.5 %", "100 %", "33.33 %"]


def test_each_teacher_has_its_row_and_its_level(tmp_path):
    rows = make_rows(0, 0.5)
    other = [dataclasses.replace(p, teacher_label=p.label) for p in rows]
    for name, of in (("a", rows), ("b", other)):
        experiment = {"method": "step_by_step", "fraction": 1.0, "seed": 0, "teacher": name}
        make_run(tmp_path / "runs" / name, of, experiment=experiment)
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    assert [row[2:] for row in report.tables["accuracy"].rows] == [
        ("step-by-step, teacher a", "1", "55.0"), ("step-by-step, teacher b", "1", "55.0"),
        ("the teacher of the others", None, "70.0"),
        ("the teacher of step-by-step, teacher b", None, "100.0"),
    ]  # fmt: skip
