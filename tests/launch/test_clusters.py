"""launch/gpu_slurm.sh with stand-ins for Slurm's commands, and the manifest for Kubernetes."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dslt import config
from dslt.core.topology import parse_topology
from dslt.main import INTERRUPTED, build_parser

ROOT = Path(__file__).parents[2]


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


def submit(tmp_path, *words, srun="exit 0", state="RUNNING"):
    """Runs the script as Slurm does; returns its status, and the calls of Slurm's commands."""
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True, exist_ok=True)
    (checkout / "launch" / "setup_venv.sh").write_text(
        'echo "setup $EXTRAS$(flock -n .venv.lock true || echo " alone")" >>"$CALLS"\n'
    )
    calls = tmp_path / "calls"
    for name, text in {"srun": srun, "squeue": f"echo {state}", "scontrol": "exit 0"}.items():
        write_script(tmp_path / "bin" / name, f'echo "{name} $*" >>"$CALLS"\n{text}\n')
    copy = shutil.copy(ROOT / "launch" / "gpu_slurm.sh", tmp_path / "slurm_script")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(checkout),
    }
    environment.pop("EXTRAS", None)  # of who runs these tests
    result = subprocess.run(["bash", copy, *words], env=environment, capture_output=True, text=True)
    lines = calls.read_text().splitlines() if calls.exists() else []
    return result.returncode, [line for line in lines if not line.startswith("squeue")]


def test_slurm_trains_on_every_gpu_and_exports_in_one_process(tmp_path):
    status, calls = submit(tmp_path / "a", "train", "a.gin", "--run_dir", "r")
    assert status == 0
    assert calls == ["setup gpu alone", "srun dslt train a.gin --run_dir r --distributed"]
    status, calls = submit(tmp_path / "b", "export", "--student", "r", srun="exit 2")
    assert status == 2
    assert calls == ["setup gpu alone", "srun --nodes=1 --ntasks=1 dslt export --student r"]


@pytest.mark.parametrize("trouble", ["no locks", "not its own"])
def test_slurm_goes_on_where_the_environment_cannot_be_locked(tmp_path, trouble):
    if trouble == "no locks":  # such as Lustre without its option
        write_script(tmp_path / "bin" / "flock", "exit 69\n")
    else:
        (tmp_path / "checkout" / ".venv.lock").mkdir(parents=True)
    status, calls = submit(tmp_path, "export")
    assert status == 0 and calls[-1] == "srun --nodes=1 --ntasks=1 dslt export"


def test_slurm_takes_a_line_of_a_sweeps_list(tmp_path):
    status, calls = submit(tmp_path, "dslt", "sweep", "s.gin", "--output_dir", "o", "--only", "r")
    assert status == 0
    assert calls[1:] == ["srun --nodes=1 --ntasks=1 dslt sweep s.gin --output_dir o --only r"]
    assert submit(tmp_path / "no_command", "dslt") == (2, [])


@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", ["scontrol requeue 17"]), ("COMPLETING", [])]
)
def test_slurm_queues_again_at_the_time_limit_but_not_when_cancelled(tmp_path, state, requeued):
    status, calls = submit(tmp_path, "train", srun=f"exit {INTERRUPTED}", state=state)
    assert status == INTERRUPTED and calls[2:] == requeued


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, []), (2, []), (INTERRUPTED, ["scontrol requeue 17"])]
)
def test_slurm_ends_as_dslt_does_where_squeue_fails(tmp_path, status, requeued):
    ended, calls = submit(tmp_path, "train", srun=f"exit {status}", state="; exit 1")
    assert ended == status and calls[2:] == requeued


def test_the_script_knows_dslts_status_of_an_interruption():
    text = (ROOT / "launch" / "gpu_slurm.sh").read_text()
    assert f"interrupted={INTERRUPTED} " in text


def test_the_manifest_runs_a_planned_slice():
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "tpu_gke.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"] * job["parallelism"]
    assert job["completions"] == job["parallelism"]
    assert (
        chips == parse_topology(f"v5e:{shape}").num_chips == math.prod(map(int, shape.split("x")))
    )
    dslt, *words = container["command"]
    args = build_parser().parse_args(words)
    assert dslt == "dslt" and args.distributed
    assert any(f"_v5e_{shape}" in name for name in args.gin_files)
    (mount,) = container["volumeMounts"]
    configs = config.parse(args.gin_files, args.gin)
    for path in (args.run_dir, *configs.data.records):
        assert path.startswith(mount["mountPath"] + "/")


def shown_commands(name):
    """`dslt train` as the file's comments, its code blocks or its manifest show it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".yaml"):
        return [re.findall(r"^ +- (train|[a-z]+/\S+\.gin|--gin=.*|--run_dir=.*)$", text, re.M)]
    lines = re.sub(r"^#", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    found = [
        re.search(r"(?:bash|sbatch) .*(?:-- |slurm\.sh )(train .*settings/paper\.gin.*)", line)
        for line in lines
    ]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize(
    "name", ["README.md", "launch/tpu.sh", "launch/gpu_slurm.sh", "launch/tpu_gke.yaml"]
)
def test_a_command_shown_for_a_cluster_gives_all_that_its_setting_leaves_open(name):
    (words,) = shown_commands(name)
    args = build_parser().parse_args(words)
    setting = config.parse(["runs/step_by_step.gin", "settings/paper.gin"])
    configs = config.parse(args.gin_files, args.gin)
    assert configs.data.records != setting.data.records
    assert configs.data.vocabulary == configs.train.init_from != setting.train.init_from
    size = configs.train.init_from.rpartition("-")[2]
    assert configs.model == config.parse([*args.gin_files, f"models/t5_v1_1_{size}.gin"]).model


@pytest.mark.parametrize(
    "script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name
)
def test_shellcheck_finds_nothing(script):
    here = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(here) if here.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    command = [shellcheck, "-x", "-P", "SCRIPTDIR", str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_scripts_run_on_the_bash_of_a_mac():
    """Bash 3.2 has none of these."""
    text = (ROOT / "launch" / "tpu.sh").read_text()
    assert not re.findall(r"mapfile|readarray|declare -A|wait -n|\$\{\w+(?:,,|\^\^)|&>>", text)
