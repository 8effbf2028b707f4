"""What one target holds: the label alone, or the label and its rationale in one text.

Imports the standard library alone. `label` is the paper's method: the rationale has a task and a
target of its own. The others are its ablations, with one task and no separate rationale:

    rationale_label    the rationale, then the label: explain first, then answer
    label_rationale    the label, then the rationale: answer first, then explain

    join_target("red is not blue .", "contradiction", "rationale_label")
    # "red is not blue . answer: contradiction"
"""

LABEL = "label"
RATIONALE_LABEL = "rationale_label"
LABEL_RATIONALE = "label_rationale"
TARGET_LAYOUTS = (LABEL, RATIONALE_LABEL, LABEL_RATIONALE)

# What stands between the two; a student's vocabulary should know their words.
MARK = {RATIONALE_LABEL: "answer:", LABEL_RATIONALE: "explanation:"}


def join_target(rationale: str | None, label: str, layout: str) -> str:
    """The text that an example's target is; the label alone where there is no rationale."""
    if layout == LABEL or rationale is None:
        return label
    parts = (rationale, label) if layout == RATIONALE_LABEL else (label, rationale)
    return f" {MARK[layout]} ".join(part.strip() for part in parts)


def label_of(target: str, layout: str) -> str:
    """The label in a target: behind the last mark or before the first; all where there is none."""
    if layout == RATIONALE_LABEL:
        return target.rpartition(MARK[layout])[2].strip()
    if layout == LABEL_RATIONALE:
        return target.partition(MARK[layout])[0].strip()
    return target
