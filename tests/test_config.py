"""Every shipped gin file parses and builds, and overrides win."""

import itertools

import pytest

from dslt.config import gin_directory, parse, parse_sweep
from dslt.errors import InputError

METHODS = sorted(path.name for path in (gin_directory() / "runs").glob("*.gin"))
SETTINGS = sorted(path.name for path in (gin_directory() / "settings").glob("*.gin"))
SWEEPS = sorted(path.name for path in (gin_directory() / "sweeps").glob("*.gin"))
SLICES = sorted(path.name for path in (gin_directory() / "slices").glob("*.gin"))
HEADER = "from __gin__ import dynamic_registration\nfrom dslt import train\n"
# (λ, whose label): what the names promise.
PROMISED = {
    "distillation.gin": (0.0, "teacher"),
    "fine_tuning.gin": (0.0, "gold"),
    "label_rationale.gin": (0.0, "gold"),
    "rationale_label.gin": (0.0, "gold"),
    "step_by_step.gin": (1.0, "gold"),
    "step_by_step_consistent.gin": (1.0, "gold"),
    "step_by_step_shared.gin": (1.0, "gold"),
    "step_by_step_shuffled.gin": (1.0, "gold"),
    "step_by_step_teacher.gin": (1.0, "teacher"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_combines_with_every_setting_in_either_order(method, setting):
    configs = parse([f"runs/{method}", f"settings/{setting}"])
    assert (configs.train.rationale_weight, configs.data.label_source) == PROMISED[method]
    assert configs.data.records and configs.data.vocabulary
    assert parse([f"settings/{setting}", f"runs/{method}"]).text == configs.text


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_names_methods_and_settings_that_are_shipped(name):
    sweep = parse_sweep([f"sweeps/{name}"])
    for method, setting in itertools.product(sweep.methods, sweep.settings):
        configs = parse([method, setting], sweep.overrides)
        assert (configs.train.rationale_weight, configs.data.label_source) == PROMISED[
            method.removeprefix("runs/")
        ]


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_after_a_setting_says_where_the_same_run_fits(name):
    configs = parse(["settings/paper.gin", f"slices/{name}"])
    assert (configs.model.remat, configs.model.dtype) == (True, "bfloat16")
    assert configs.data.max_input_length == 1024
    header = (gin_directory() / "slices" / name).read_text().split("from __gin__")[0]
    assert f"settings/paper.gin slices/{name} --topology v5e:" in header


def test_a_model_file_after_a_setting_replaces_its_model():
    configs = parse(["settings/paper.gin", "models/t5_v1_1_large.gin"])
    assert (configs.model.d_model, configs.model.num_layers) == (1024, 24)
    assert configs.optimizer.learning_rate == 5e-5


def test_overrides_win_and_stand_in_the_operative_config_which_says_the_same_again(tmp_path):
    overrides = ["train.TrainConfig.rationale_weight = 0.25", "t5.T5Config.num_layers = 5"]
    configs = parse(["runs/step_by_step.gin", "settings/facts.gin"], overrides)
    assert (configs.train.rationale_weight, configs.model.num_layers) == (0.25, 5)
    assert all(override in configs.text for override in overrides)
    (tmp_path / "config.gin").write_text(configs.text)
    assert parse([str(tmp_path / "config.gin")]) == configs


def test_a_byte_order_mark_is_no_part_of_a_gin_file(tmp_path):
    own = tmp_path / "own.gin"
    for text in ((gin_directory() / "models/tiny.gin").read_text(), "include 'models/tiny.gin'\n"):
        own.write_text(text, encoding="utf-8-sig")
        assert parse([str(own)]) == parse(["models/tiny.gin"])


def test_a_directory_of_the_same_name_does_not_hide_the_shipped_files(tmp_path, monkeypatch):
    """`launch/local.sh` makes a directory `runs`, which Python takes for a package."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parse(["runs/fine_tuning.gin", "settings/facts.gin"]).model.d_model == 64


def test_nothing_is_left_over_from_an_earlier_parse():
    parse(["settings/facts.gin"], ["train.TrainConfig.seed = 7"])
    assert parse(["settings/facts.gin"]).train.seed == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("from dslt import nothing\n", "nothing"),
        ("include 'models/none.gin'\n", "Shipped gin files"),
        ("train.TrainConfig.seed 1\n", "broken.gin.*line 1"),
        ("train.TrainConfig.seed = '''\n", "multi-line"),
        ("train.TrainConfig.seed = " + "[" * 5000, "broken.gin"),
        ("import antigravity\n", "found `import antigravity`; expected one of"),
        ("from os import path\n", "found `from os import path`"),
        (HEADER + "train.TrainConfig.init_from = @train.json.dumps()\n", "nothing is called"),
        (HEADER + "train.TrainConfig.init_from = @train.json.dumps\n", "nothing is called"),
        (HEADER + "train.TrainConfig.init_from = %path\n", "macros are not used"),
        ("include \\\n 'models/tiny.gin'\n", "Shipped gin files|begins its line"),
        ("include 'broken.gin'\n", "begins its line|not itself included"),
    ],
)
def test_a_broken_gin_file_is_an_input_error(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.gin").write_text(text)
    with pytest.raises(InputError, match=says):
        parse([str(tmp_path / "broken.gin")])


@pytest.mark.parametrize(
    "override",
    [
        "train.TrainConfig.num_steps = 1" + "0" * 400,
        "train.TrainConfig.rationale_weight = 1" + "0" * 400,
        "train.TrainConfig.rationale_weight = 1e999",
        "t5.T5Config.d_model = 4294967296",
        r"pipeline.DataConfig.vocabulary = 'a\0b'",
        "pipeline.DataConfig.mixture_rates = {'facts': 'high'}",
        "pipeline.DataConfig.mixture_rates = {1: 1.0}",
        r"pipeline.DataConfig.records = ('\ud800',)",
    ],
)
def test_a_value_that_no_run_can_hold_is_an_input_error(override):
    with pytest.raises(InputError, match="expected"):
        parse(["settings/facts.gin"], [override])


def test_mixture_rates_are_numbers_by_dataset():
    rates = {"facts": 2, "sums": 0.5}
    override = f"pipeline.DataConfig.mixture_rates = {rates}"
    assert parse(["settings/facts.gin"], [override]).data.mixture_rates == rates


def test_a_gin_file_runs_nothing(tmp_path, monkeypatch):
    """gin itself would import the module and call the function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trap.py").write_text("open('sprung', 'w')\ndef spring(): open('sprung', 'w')\n")
    (tmp_path / "imports.gin").write_text("import trap\n")
    (tmp_path / "includes.gin").write_text("include 'imports.gin'\n")
    mkdir = "train.dataclasses.inspect.os.mkdir"
    (tmp_path / "calls.gin").write_text(
        f"{HEADER}{mkdir}.path = 'sprung'\ntrain.TrainConfig.init_from = @{mkdir}()\n"
    )
    for name in ("imports.gin", "includes.gin", "calls.gin"):
        with pytest.raises(InputError):
            parse([name])
    assert not (tmp_path / "sprung").exists()


def test_a_mistyped_file_is_told_its_neighbours():
    with pytest.raises(InputError, match=r"Did you mean sweeps/embedded\.gin"):
        parse_sweep(["sweeps/embeded.gin"])
    with pytest.raises(InputError, match=r"no shipped gin file\. Shipped gin files: models/"):
        parse(["qqqq"])
