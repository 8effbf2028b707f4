"""Every test runs on a CPU that poses as eight devices; set before anything imports JAX.

Programs are compiled without LLVM's optimisations, once for all tests: a step then compiles in one
second instead of six, and what is tested does not run long.
"""

import importlib.metadata
import os
import shutil
import subprocess
import tempfile

import pytest

from dslt.commands.bench import load_triton

load_triton()  # before any test imports TensorFlow

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
}
_jaxlib = importlib.metadata.version("jaxlib").split(".")
if [int(part) for part in _jaxlib[:2]] < [0, 11]:  # later ones end the process at the name
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
_missing = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_missing]).strip()
_compile_cache = tempfile.TemporaryDirectory(prefix="dslt-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compile_cache.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(scope="session")
def build_batch():
    """A function that packs segments by hand: rows of (source, target, role[, weight])."""
    from dslt.core.batch import PAD_ID, empty_batch

    def build(rows, source_length: int, target_length: int):
        batch = empty_batch(len(rows), source_length, target_length)
        for row, segments in enumerate(rows):
            source_end = target_end = 0
            for segment_id, (source, target, role, *weight) in enumerate(segments, start=1):
                sources = slice(source_end, source_end := source_end + len(source))
                targets = slice(target_end, target_end := target_end + len(target))
                assert source_end <= source_length and target_end <= target_length
                batch.encoder_input_tokens[row, sources] = source
                batch.encoder_segment_ids[row, sources] = segment_id
                batch.decoder_target_tokens[row, targets] = target
                batch.decoder_segment_ids[row, targets] = segment_id
                batch.decoder_input_tokens[row, targets] = [PAD_ID, *target[:-1]]
                batch.decoder_loss_roles[row, targets] = role
                batch.decoder_loss_weights[row, targets] = weight[0] if weight else 1.0
        return batch

    return build


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes, `1400k`; gives it, and to resize it.

    Where there is no right to do so, what asks for it is skipped: the tests with an injected
    ENOSPC remain.
    """
    path = tmp_path / "disk"
    path.mkdir()

    def mount(*arguments: str) -> bool:
        command = ["mount", *arguments, str(path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def make(size: str):
        if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
            pytest.skip("no right to mount a small file system")
        return path, lambda size: mount("-o", f"remount,size={size}")

    yield make
    if os.path.ismount(path):
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """The path of a few examples with the rationales of the scripted teacher."""
    from dslt.main import main

    directory = tmp_path_factory.mktemp("records")
    sizes = ["--train", "60", "--validation", "12", "--test", "12"]
    args = ["--dataset", "facts", "--teacher", "scripted", "--mistake_rate", "0.2"]
    assert main(["extract", *args, *sizes, "--output_dir", str(directory)]) == 0
    return directory / "records.jsonl"


@pytest.fixture(scope="session")
def trained_run(records, tmp_path_factory):
    """The directory of a trained and evaluated run, which tests take a copy of: `run`."""
    from small_run import train_args

    from dslt.main import main

    directory = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_args(records, directory)) == 0
    assert main(["evaluate", "--run_dir", str(directory)]) == 0
    return directory


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A trained and evaluated run, a copy for each module: its tests may judge it again."""
    from dslt.workdir import RunDir

    return RunDir(shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "run"))
