"""README.md of an exported student: what its run knows of itself, and gaps to fill for the rest.

May import records, workdir and metrics. What the run does not say is called unknown; nothing is
guessed. Names and labels come from files that others may have written, so all are escaped.

    text = model_card.write_card("student", RunDir(Path("runs/facts/step_by_step")), step=3000)
"""

import collections
import dataclasses
import hashlib
import html
import json
import re
from pathlib import Path

from dslt.errors import InputError
from dslt.records import read_examples
from dslt.workdir import RunDir, StudentFormat, read_config, read_json, read_json_rows

UNKNOWN = "unknown"
FILL_IN = "*to be filled in*"
METHODS = {  # (whether rationales are a task of their own, label_source, target_layout)
    (False, "gold", "label"): "standard fine-tuning on gold labels",
    (False, "teacher", "label"): "standard distillation: the teacher's labels",
    (True, "gold", "label"): "distilling step-by-step: gold labels and the teacher's rationales",
    (True, "teacher", "label"): "distilling step-by-step: the teacher's labels and rationales",
    (False, "gold", "rationale_label"): "one target: the teacher's rationale, then the gold label",
    (False, "teacher", "rationale_label"): "one target: the teacher's rationale, then its label",
    (False, "gold", "label_rationale"): "one target: the gold label, then the teacher's rationale",
    (False, "teacher", "label_rationale"): "one target: the teacher's label, then its rationale",
}


@dataclasses.dataclass
class RecordsSummary:
    """What a records file says of its provenance.

    Attributes:
      splits: rows of each (dataset, split).
      teachers: rationales by who gave them; None: the row does not say.
    """

    path: str
    splits: collections.Counter
    teachers: collections.Counter


def write_card(name: str, run: RunDir | None, step: int | None, format: StudentFormat) -> str:
    """The text of a model card, YAML metadata first.

    Args:
      name: of the student.
      run: where it was trained, or None where that is unknown.
      step: of its checkpoint, or None likewise.
    """
    info = read_json(run.info) if run and run.info.exists() else {}
    settings = read_config(run.config) if run else {}
    rows = read_json_rows(run.evaluations) if run else []
    row = next((row for row in rows if row["step"] == step), {})
    summaries = [
        summarise_records(path, digest) for path, digest in info.get("records", {}).items()
    ]
    return "\n".join(
        [
            *_metadata(name, summaries, row),
            "",
            f"# {escape(name)}",
            "",
            "A T5, exported by dslt, which trains small models on a large one's answers and "
            "explanations ([distilling step-by-step](https://arxiv.org/abs/2305.02301)).",
            "",
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
            "",
            'model = AutoModelForSeq2SeqLM.from_pretrained("PATH")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            f"ids = tokenizer({_literal(format.input_prefix_label)} + problem, "
            'return_tensors="pt").input_ids',
            "tokenizer.decode(model.generate(ids)[0], skip_special_tokens=True)",
            "```",
            "",
            f"Inputs begin with {_code(format.input_prefix_label)} for an answer and with "
            f"{_code(format.input_prefix_rationale)} for a rationale (the decoder's first input is "
            f"then {format.rationale_start_id}); {format.max_input_length} tokens at most.",
            "",
            "## Training",
            "",
            *_training_table(info, settings, step),
            "",
            "## Data and teacher",
            "",
            *_data_list(info, summaries),
            "",
            "## Metrics",
            "",
            *_metrics_table(row),
            "",
            "## Licence and limits",
            "",
            f"- Licence of the student: {FILL_IN}",
            f"- Licence of the data: {FILL_IN}",
            f"- Terms of the teacher, where they bind what is trained on its output: {FILL_IN}",
            f"- Intended use, languages and known failures: {FILL_IN}",
            "",
        ]
    )


def summarise_records(path: str, digest: str) -> RecordsSummary | None:
    """Counts of the file that a run learnt from; None where it is gone or has changed since."""
    try:
        with Path(path).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return None
        summary = RecordsSummary(path, collections.Counter(), collections.Counter())
        for example in read_examples(path):
            summary.splits[example.dataset, example.split] += 1
            summary.teachers.update(rationale.teacher for rationale in example.rationales())
    except (OSError, InputError):
        return None
    return summary


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no table cell's end."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    return re.sub(r"([\\`*_{}\[\]()#+.!|~>-])", r"\\\1", html.escape(text, quote=False))


def _literal(text: str) -> str:
    """A Python string that no text can end or lead out of its code block."""
    return json.dumps(text).replace("`", "\\u0060")


def _code(text: str) -> str:
    return f"<code>{html.escape(_literal(text))}</code>"


def _yaml(text: str) -> str:
    """A JSON string, which YAML reads alike."""
    return json.dumps("".join(c if c.isprintable() else " " for c in text), ensure_ascii=True)


def _metadata(name: str, summaries: list, row: dict) -> list[str]:
    datasets = sorted({dataset for s in summaries if s for dataset, _ in s.splits})
    lines = [
        "---",
        "library_name: transformers",
        "license: unknown  # to be filled in, likewise `language` and `base_model`",
        "tags:",
        *(f"- {tag}" for tag in ("t5", "distillation", "distilling-step-by-step", "dslt")),
    ]
    if splits := _judged_splits(row):
        lines += ["model-index:", f"- name: {_yaml(name)}", "  results:"]
        for split, accuracy, _, _ in splits:
            data = ", ".join(datasets) or UNKNOWN
            lines += [
                "  - task:",
                "      type: text-generation",
                "    dataset:",
                f"      name: {_yaml(data)}",
                f"      type: {_yaml(data)}",
                f"      split: {_yaml(split)}",
                "    metrics:",
                "    - type: accuracy",
                f"      value: {accuracy}",
            ]
    return [*lines, "---"]


def _judged_splits(row: dict) -> list[tuple[str, float, float, int]]:
    """(split, accuracy, standard error, examples) where all are known; those of single datasets are
    left out."""
    names = [name.removesuffix("/accuracy") for name in row if name.endswith("/accuracy")]
    found = [
        (name, *(row.get(f"{name}/{key}") for key in ("accuracy", "standard_error", "examples")))
        for name in names
        if "/" not in name
    ]
    return [split for split in found if None not in split]


def _training_table(info: dict, settings: dict, step: int | None) -> list[str]:
    def setting(name: str):
        return settings.get(name, UNKNOWN)

    weight = info.get("rationale_weight", UNKNOWN)
    rows = {
        "method": UNKNOWN if weight == UNKNOWN else _method(weight != 0, settings),
        "λ (rationale_weight)": weight,
        "share of the train split": setting("pipeline.DataConfig.train_fraction"),
        "starts from": _start(info) or setting("train.TrainConfig.init_from") or "random weights",
        "parameters": info.get("num_params", UNKNOWN),
        "checkpoint": UNKNOWN if step is None else f"step {step}",
        "examples a step": setting("pipeline.DataConfig.batch_examples"),
        "optimizer": setting("optimizer.OptimizerConfig.name"),
        "learning rate": setting("optimizer.OptimizerConfig.learning_rate"),
        "seed": info.get("seed", UNKNOWN),
        "dslt": f"{info.get('dslt', UNKNOWN)}, commit {info.get('commit') or UNKNOWN}",
    }
    lines = [f"| {escape(key)} | {escape(value)} |" for key, value in rows.items()]
    return ["| | |", "|---|---|", *lines]


def _start(info: dict) -> str | None:
    branch = info.get("branched_from")
    return branch and f"step {branch['step']} of {branch['checkpoints']}"


def _method(has_rationale_task: bool, settings: dict) -> str:
    source = settings.get("pipeline.DataConfig.label_source")
    layout = settings.get("pipeline.DataConfig.target_layout", "label")  # older runs have none
    method = METHODS.get((has_rationale_task, str(source), str(layout)), UNKNOWN)
    if not has_rationale_task:
        return method
    if settings.get("pipeline.DataConfig.shared_encoder") is True:
        method += ", one encoder pass for both"
    if settings.get("pipeline.DataConfig.shuffle_rationales") is True:
        method += ", each rationale another example's (a control)"
    if weight := settings.get("train.TrainConfig.consistency_weight"):
        method += f", a consistency term of weight {weight}"
    return method


def _data_list(info: dict, summaries: list[RecordsSummary | None]) -> list[str]:
    lines = []
    for (path, digest), summary in zip(info.get("records", {}).items(), summaries, strict=True):
        lines.append(f"- {escape(Path(path).name)} (sha256 {escape(digest)})")
        if summary is None:
            lines.append("  - contents: unknown (the file is gone or has changed since)")
            continue
        for (dataset, split), count in sorted(summary.splits.items()):
            lines.append(f"  - {escape(dataset)}, {escape(split)}: {count} examples")
        for teacher, count in summary.teachers.most_common():
            lines.append(f"  - teacher {escape(teacher or UNKNOWN)}: {count} rationales")
        if not summary.teachers:
            lines.append("  - teacher: none; there are no rationales")
    return lines or [f"- data: {UNKNOWN}", f"- teacher: {UNKNOWN}"]


def _metrics_table(row: dict) -> list[str]:
    splits = _judged_splits(row)
    if not splits:
        return [f"Accuracy: {UNKNOWN}"]
    lines = [
        f"| {escape(split)} | {100 * accuracy:.1f} % | {100 * error:.1f} | {examples} |"
        for split, accuracy, error, examples in splits
    ]
    return ["| split | accuracy | ± (binomial) | examples |", "|---|---|---|---|", *lines]
