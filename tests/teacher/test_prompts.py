import pytest

from dslt.errors import InputError
from dslt.teacher.parse import choices_in, parse_completion
from dslt.teacher.prompts import DIRECTORY, Exemplar, Prompt, load_prompt, prompt_of, store_prompt

NAMES = sorted(path.stem for path in DIRECTORY.glob("*.toml"))


def error_of(*args):
    with pytest.raises(InputError) as caught:
        load_prompt(*args)
    return str(caught.value)


def test_there_is_a_prompt_for_every_kind_of_answer():
    kinds = {name: load_prompt(name).answer_kind for name in NAMES}
    assert kinds == {"nli": "label", "choice": "choice", "equation": "equation", "generic": "text"}
    assert prompt_of("esnli") == "nli" and prompt_of("mine") == "generic"


@pytest.mark.parametrize("name", NAMES)
def test_exemplars_are_answered_as_the_parser_reads_answers(name):
    """What a teacher is shown is what is understood when it does the same."""
    prompt = load_prompt(name)
    assert prompt.exemplars
    for exemplar in prompt.exemplars:
        shown = prompt.messages("x")[2 + 2 * prompt.exemplars.index(exemplar)]
        choices = choices_in(exemplar.input)
        parsed = parse_completion(shown["content"], prompt.form, choices)
        assert parsed.reason is None and parsed.rationale == exemplar.rationale
        assert parsed.answer.replace(" ", "") in exemplar.answer.replace(" ", "")


def test_chat_turns_and_plain_text_by_hand():
    prompt = Prompt(
        "label", "So the answer is", (Exemplar("one", "because", "yes"),), ("yes", "no"), "Decide.",
        "One of {labels}.",
    )  # fmt: skip
    assert prompt.messages("two") == [
        {"role": "system", "content": "Decide. One of yes, no."},
        {"role": "user", "content": "Q: one"},
        {"role": "assistant", "content": "because So the answer is yes."},
        {"role": "user", "content": "Q: two"},
    ]
    assert prompt.text("two") == (
        "Decide. One of yes, no.\n\nQ: one\nA: because So the answer is yes.\n\nQ: two\nA:"
    )
    assert prompt.messages("two", hint="no")[-1]["content"].startswith(
        "Q: two\nHint: the answer is no."
    )


def test_a_problem_is_put_in_as_it_is():
    prompt = load_prompt("generic")
    problem = "{input} {rationale} {answer} {labels} {0} %s {prompt.source} \\n"
    assert prompt.messages(problem)[-1]["content"] == f"Q: {problem}"
    assert f"Q: {problem}\n" in prompt.text(problem)
    assert "Hint: the answer is {input}." in prompt.messages("x", hint="{input}")[-1]["content"]


def test_a_copied_prompt_is_another_one_as_soon_as_it_changes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text((DIRECTORY / "nli.toml").read_text())
    assert load_prompt(str(path)) == load_prompt("nli")
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as an editor on Windows may
    assert load_prompt(str(path)) == load_prompt("nli")
    path.write_text(path.read_text().replace("raincoats", "coats"))
    assert load_prompt(str(path)).digest != load_prompt("nli").digest


def test_labels_of_ones_own_make_the_generic_prompt_a_label_prompt():
    prompt = load_prompt("generic", ["good", "bad"])
    assert prompt.form.labels == ("good", "bad") and prompt.form.kind == "label"
    assert "X is one of: good, bad." in prompt.messages("x")[0]["content"]
    assert prompt.digest != load_prompt("generic").digest
    assert "a label is '  '; expected some text" in error_of("generic", ["good", "  "])


def test_a_prompt_is_stored_once_under_its_digest(tmp_path):
    prompt = load_prompt("nli")
    first, second = store_prompt(prompt, tmp_path), store_prompt(prompt, tmp_path)
    assert first == second == tmp_path / "prompts" / f"{prompt.digest}.toml"
    assert load_prompt(str(first)) == prompt


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = [", "is no prompt file"),
        ('answer_kind = "text"', "answer_mark is missing"),
        ('answer_kind = "text"\nanswer_mark = "So"\nfoo = 1', "unknown key 'foo'"),
        ('answer_kind = "number"\nanswer_mark = "So"', "kind is 'number'"),
        ('answer_kind = "label"\nanswer_mark = "So"', "labels"),
        ('answer_kind = "text"\nanswer_mark = "So"\nquestion = "Q:"', "question has no {input}"),
        ('answer_kind = "text"\nanswer_mark = "So"\nstop = "x"', "stop is 'x'; expected a list"),
        ('answer_kind = "text"\nanswer_mark = "So"\n[[exemplars]]\ninput = "x"', "an exemplar is"),
        (
            'answer_kind = "text"\nanswer_mark = "So"\nexemplars = 5',
            "exemplars is 5; expected",
        ),
    ],
)
def test_what_is_no_prompt_is_said(tmp_path, text, says):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    message = error_of(str(path))
    assert says in message and str(path) in message


def test_unknown_prompts_are_named_with_those_there_are():
    assert "expected choice, equation, generic, nli" in error_of("sums")


def test_a_path_is_never_taken_for_a_shipped_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    source = (DIRECTORY / "generic.toml").read_text()
    for name in ("mine/nli.toml", "mine.toml"):
        (tmp_path / name).write_text(source)
    assert load_prompt("mine/nli.toml").answer_kind == "text"
    assert "mine/nli: there is no such prompt; there is mine/nli.toml" in error_of("mine/nli")
    assert "./nli: there is no such" in error_of("./nli")
    assert "there is mine.toml; expected choice" in error_of("mine")
    assert load_prompt("nli").answer_kind == "label"


def test_a_declared_mark_is_read_in_any_case_and_spacing():
    prompt = Prompt("text", "Lösung:")
    example = parse_completion("Weil es regnet. lösung : nass.", prompt.form)
    assert (example.rationale, example.answer) == ("Weil es regnet.", "nass")
    assert parse_completion("Weil. The answer is nass.", prompt.form).reason == "no answer"


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = " + "[" * 5000, "a = 1\na = 2", "\0"])
def test_toml_that_its_reader_chokes_on_is_an_input_error(tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match="is no prompt file"):
        load_prompt(str(tmp_path / "mine.toml"))
