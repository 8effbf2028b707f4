"""The SeqIO Tasks' tokens on disk: run once, then memory-mapped, and TensorFlow stays out.

May import numpy, `dslt.records` and the vocabulary at import; building imports the Tasks, and with
them SeqIO and TensorFlow.

    index = open_index(cache_dir, "records.jsonl")
    task = open_task(cache_dir, index, "svamp", "label", vocabulary, TaskSettings())
    train = task.split("train")

A cache is one directory that appears whole or not at all, named after what it holds and a digest
of all that its content depends on: another vocabulary, prefix, limit or records file is another
directory, and nothing is ever updated in place.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from dslt import strict_json
from dslt.core.batch import EOS_ID
from dslt.data.build_once import open_or_build
from dslt.data.packing import TokenTable
from dslt.data.target_layout import LABEL, TARGET_LAYOUTS, join_target
from dslt.data.vocabulary import Vocabulary
from dslt.errors import InputError
from dslt.records import SPLITS, Example, read_examples

FORMAT = 2  # of the directories below; raise it when what is in them changes

LABEL_TASK = "label"
RATIONALE_TASK = "rationale"
TASKS = (LABEL_TASK, RATIONALE_TASK)
LABEL_SOURCES = ("gold", "teacher")

SIDES = ("inputs", "targets")  # of a Task's examples
CHUNK_EXAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What makes a Task's tokens, besides the records and the vocabulary.

    Attributes:
      label_source: `gold` or `teacher`: what the train split learns as the label. Held-out splits
        are always judged by gold.
      input_prefix_label, input_prefix_rationale: what tells the student the task.
      max_input_length, max_target_length: tokens, EOS included; what is longer is cut and counted.
      target_layout: of the label task's train targets. `label` is the paper's; the others, for
        ablations, hold rationale and label in one target, in the order of the name (see
        target_layout.py): then there is no separate rationale task.
    """

    label_source: str = "gold"
    input_prefix_label: str = "predict: "
    input_prefix_rationale: str = "explain: "
    max_input_length: int = 1024
    max_target_length: int = 256
    target_layout: str = LABEL

    def __post_init__(self):
        for name, known in (("label_source", LABEL_SOURCES), ("target_layout", TARGET_LAYOUTS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{type(self).__name__}.{name} is {getattr(self, name)!r}; expected one of "
                    f"{', '.join(known)}"
                )
        for name in ("max_input_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise InputError(
                    f"{type(self).__name__}.{name} is {getattr(self, name)}; expected at least 2: "
                    "a token and EOS"
                )

    def prefix(self, task: str) -> str:
        """What one of TASKS has before its inputs."""
        return self.input_prefix_label if task == LABEL_TASK else self.input_prefix_rationale


def task_name(dataset: str, task: str) -> str:
    """The name of a SeqIO Task: `<dataset>_label` or `<dataset>_rationale`."""
    return f"{dataset}_{task}"


def target_texts(
    example: Example, task: str, settings: TaskSettings
) -> tuple[tuple[str, float], ...]:
    """What a Task learns to answer to an example, each text with its weight.

    One label, or one and more rationales; () where the example has no such text.
    """
    if task == RATIONALE_TASK:
        return tuple((rationale.text, rationale.weight) for rationale in example.rationales())
    if settings.label_source == "teacher" and example.split == "train":
        text = example.teacher_label
    else:
        text = example.label
    if text is None:
        return ()
    if example.split == "train":
        text = join_target(example.rationale, text, settings.target_layout)
    return ((text, 1.0),)


@dataclasses.dataclass(frozen=True)
class RecordsIndex:
    """What a records file holds.

    Attributes:
      path: the file.
      digest: sha256 hex of its bytes.
      counts: dataset to split to how many: `examples`, and those with a `gold` label, a `teacher`
        label; `rationale` counts rationales, of which an example may have several.
      ids: the example ids as UTF-8 bytes, entry i for row i.
    """

    path: Path
    digest: str
    counts: Mapping[str, Mapping[str, Mapping[str, int]]]
    ids: TokenTable

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names of the datasets, sorted."""
        return tuple(sorted(self.counts))

    def task_examples(self, dataset: str, task: str, settings: TaskSettings) -> dict[str, int]:
        """Split to the number of examples that a Task has there, without empty splits.

        Each rationale is an example of the rationale Task.
        """
        numbers = {}
        for split in SPLITS:
            source = settings.label_source if split == "train" else "gold"
            kind = source if task == LABEL_TASK else "rationale"
            number = self.counts[dataset].get(split, {}).get(kind, 0)
            if number:
                numbers[split] = number
        return numbers

    def example_id(self, row: int) -> str:
        """The id of one row."""
        start, stop = self.ids.offsets[row : row + 2]
        return bytes(self.ids.tokens[start:stop]).decode("utf-8")


def scan_records(path: str | os.PathLike) -> RecordsIndex:
    """Reads a records file through; raises InputError as `read_examples` does."""
    counts: dict = {}
    ids = bytearray()
    offsets = [0]
    for example in read_examples(path):
        kinds = ("examples", "gold", "teacher", "rationale")
        splits = counts.setdefault(example.dataset, {})
        split = splits.setdefault(example.split, dict.fromkeys(kinds, 0))
        split["examples"] += 1
        split["gold"] += example.label is not None
        split["teacher"] += example.teacher_label is not None
        split["rationale"] += len(example.rationales())
        ids += example.id.encode("utf-8")
        offsets.append(len(ids))
    table = TokenTable(np.frombuffer(bytes(ids), np.uint8), np.array(offsets, np.int64))
    return RecordsIndex(Path(path), file_digest(Path(path)), counts, table)


def open_index(cache_dir: str | os.PathLike, path: str | os.PathLike) -> RecordsIndex:
    """The index of a records file, scanned at the first time and then read from the cache."""
    digest = file_digest(Path(path))

    def build(directory: Path) -> None:
        index = scan_records(path)
        np.save(directory / "ids.npy", index.ids.tokens)
        np.save(directory / "id_offsets.npy", index.ids.offsets)
        _write_json(directory / "meta.json", {"format": FORMAT, "counts": index.counts})
        _require_digest(index.path, digest)

    directory = open_or_build(Path(cache_dir), f"records-{digest[:16]}", build)
    counts = _read_meta(directory)["counts"]
    number = sum(split["examples"] for splits in counts.values() for split in splits.values())
    ids = _load_table(directory, "ids.npy", "id_offsets.npy", number)
    return RecordsIndex(Path(path), digest, counts, ids)


@dataclasses.dataclass(frozen=True)
class CachedSplit:
    """The tokens of one Task and split. Entry i of each is the same example.

    Attributes:
      inputs, targets: EOS included.
      rows: [entries] int64, each example's row in the records file; ascending, and repeated where
        an example has several rationales.
      weights: [entries] float32, of each target's tokens in the loss.
    """

    inputs: TokenTable
    targets: TokenTable
    rows: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class CachedTask:
    """A built cache of one Task.

    Attributes:
      directory: where it lies.
      counts: split to `examples`, `input_tokens`, `target_tokens`, `truncated_inputs`,
        `truncated_targets` (examples), `unknown_inputs`, `unknown_targets` (tokens).
    """

    directory: Path
    counts: Mapping[str, Mapping[str, int]]

    def split(self, name: str) -> CachedSplit:
        """Maps one split's arrays; raises InputError if they are not what was written."""
        number = self.counts[name]["examples"]
        tables = [
            _load_table(self.directory, f"{name}.{side}.npy", f"{name}.{side}_offsets.npy", number)
            for side in ("inputs", "targets")
        ]
        rows, weights = (
            _load_array(self.directory, f"{name}.{column}.npy", number)
            for column in ("rows", "weights")
        )
        return CachedSplit(*tables, rows, weights)


def open_task(
    cache_dir: str | os.PathLike,
    index: RecordsIndex,
    dataset: str,
    task: str,
    vocabulary: Vocabulary,
    settings: TaskSettings,
) -> CachedTask | None:
    """The tokens of a Task, from the cache or built now; None if no example has its target."""
    examples = index.task_examples(dataset, task, settings)
    if not examples:
        return None
    name = task_name(dataset, task)
    key = {
        "format": FORMAT,
        "task": name,
        "vocabulary": vocabulary.digest,
        "records": index.digest,
        "prefix": settings.prefix(task),
        "label_source": settings.label_source if task == LABEL_TASK else None,
        "target_layout": settings.target_layout if task == LABEL_TASK else None,
        "max_input_length": settings.max_input_length,
        "max_target_length": settings.max_target_length,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    build = functools.partial(_build_task, key, index, vocabulary, settings, examples)
    directory = open_or_build(Path(cache_dir), f"{name}-{digest[:16]}", build)
    return CachedTask(directory, _read_meta(directory)["counts"])


def _build_task(
    key: dict,
    index: RecordsIndex,
    vocabulary: Vocabulary,
    settings: TaskSettings,
    examples: dict[str, int],
    directory: Path,
) -> None:
    """Runs one registered Task over its splits; the only way to TensorFlow in this module."""
    import seqio
    from tqdm import tqdm

    from dslt.data import tasks

    tasks.register_tasks(index, vocabulary, settings)
    task = seqio.TaskRegistry.get(key["task"])
    counts = {}
    with tqdm(total=sum(examples.values()), desc=key["task"], unit="ex", disable=None) as bar:
        for split in examples:
            counts[split] = _write_split(
                directory, split, _task_chunks(task, split), vocabulary, settings, bar.update
            )
    _write_json(directory / "meta.json", {**key, "counts": counts})
    _require_digest(index.path, key["records"])


def _require_digest(path: Path, digest: str) -> None:
    """Raises InputError for a file that was replaced since its digest was taken."""
    now = file_digest(path)
    if now != digest:
        raise InputError(
            f"{path}: changed while its token cache was built (sha256 {now[:16]}, expected "
            f"{digest[:16]}); nothing is kept, so start again once the file is whole"
        )


def _task_chunks(task, split: str) -> Iterator[tuple]:
    """Yields (inputs, their lengths, targets, their lengths, rows, weights) of 1,024 examples."""
    dataset = task.get_dataset(
        sequence_length=None, split=split, shuffle=False, num_epochs=1, try_in_mem_cache=False
    )
    columns = (*SIDES, "row", "weight")
    dataset = dataset.map(lambda example: {column: example[column] for column in columns})
    for chunk in dataset.ragged_batch(CHUNK_EXAMPLES):
        arrays = []
        for side in SIDES:
            arrays += [chunk[side].flat_values.numpy(), np.diff(chunk[side].row_splits.numpy())]
        yield *arrays, chunk["row"].numpy(), chunk["weight"].numpy()


def _write_split(
    directory: Path,
    split: str,
    chunks: Iterator[tuple],
    vocabulary: Vocabulary,
    settings: TaskSettings,
    advance: Callable[[int], object],
) -> dict[str, int]:
    """Streams one split's arrays to disk and returns its counts."""
    limits = {"inputs": settings.max_input_length, "targets": settings.max_target_length}
    counts = {"examples": 0}
    with contextlib.ExitStack() as stack:
        tokens, offsets = (
            {
                side: stack.enter_context(_ArrayWriter(directory / name.format(split, side), dtype))
                for side in SIDES
            }
            for name, dtype in (("{}.{}.npy", np.int32), ("{}.{}_offsets.npy", np.int64))
        )
        rows, weights = (
            stack.enter_context(_ArrayWriter(directory / f"{split}.{name}.npy", dtype))
            for name, dtype in (("rows", np.int64), ("weights", np.float32))
        )
        for side in SIDES:
            offsets[side].append(np.zeros(1, np.int64))
        for *flat, chunk_rows, chunk_weights in chunks:
            for side, values, lengths in zip(SIDES, flat[::2], flat[1::2], strict=True):
                kept, kept_lengths = truncate(values, lengths, limits[side])
                offsets[side].append(tokens[side].size + np.cumsum(kept_lengths))
                tokens[side].append(kept)
                noun = side.removesuffix("s")
                _add(counts, f"{noun}_tokens", kept.size)
                _add(counts, f"truncated_{side}", (kept_lengths < lengths).sum())
                _add(counts, f"unknown_{side}", (kept == vocabulary.unk_id).sum())
            rows.append(chunk_rows)
            weights.append(chunk_weights)
            counts["examples"] += len(chunk_rows)
            advance(len(chunk_rows))
    return counts


def truncate(
    tokens: np.ndarray, lengths: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts sequences to `max_length` tokens of which the last is EOS.

    Args:
      tokens: [total] integers, the sequences behind one another.
      lengths: [n], of each.

    Returns:
      ([kept] int32 tokens, [n] int64 lengths).
    """
    kept = np.minimum(lengths, max_length)
    position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = tokens[position < np.repeat(kept, lengths)].astype(np.int32)
    tokens[np.cumsum(kept)[kept < lengths] - 1] = EOS_ID
    return tokens, kept.astype(np.int64)


class _ArrayWriter:
    """Appends to a one-dimensional .npy file whose length is known only at the end."""

    def __init__(self, path: Path, dtype: type):
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self.size = 0
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        """Writes [n] values behind those that are there."""
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self.size += len(values)

    def __enter__(self) -> "_ArrayWriter":
        return self

    def __exit__(self, *exception) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()  # numpy leaves room in it for the first axis to grow
            assert self._file.tell() == self._header_bytes

    def _write_header(self) -> None:
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, description)


def _add(counts: dict[str, int], name: str, number: int) -> None:
    counts[name] = counts.get(name, 0) + int(number)


def _read_meta(directory: Path) -> dict:
    try:
        return strict_json.loads((directory / "meta.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"meta.json: {error}") from None


def _load_table(directory: Path, tokens: str, offsets: str, number: int) -> TokenTable:
    """Maps a table and checks that its parts belong together."""
    bounds = _load_array(directory, offsets, number + 1)
    if bounds.dtype != np.int64 or bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise _damaged(directory, f"{offsets} are no ascending offsets from 0")
    return TokenTable(_load_array(directory, tokens, int(bounds[-1])), bounds)


def _load_array(directory: Path, name: str, size: int) -> np.ndarray:
    try:
        array = np.load(directory / name, mmap_mode="r" if size else None, allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, which fails in many ways
        raise _damaged(directory, f"{name}: {error}") from None
    if array.shape != (size,):
        raise _damaged(directory, f"{name} has shape {array.shape}, expected ({size},)")
    return array


def _damaged(directory: Path, what: str) -> InputError:
    return InputError(
        f"{directory}: is no whole token cache ({what}); delete this directory and start again, "
        "and it is built anew from the records"
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a JSONL file of records"
        ) from None
