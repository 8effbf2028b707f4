"""From records files to the batches of a run, and to the inputs of an evaluation.

May import numpy, `dslt.records`, `dslt.core.batch` and the data wing; on a built token cache
neither SeqIO nor TensorFlow is imported.

    config = DataConfig(records=("svamp.jsonl",), vocabulary="spiece.model", batch_examples=64)
    vocabulary = make_vocabulary(config, keep_in="runs/svamp/vocabulary")
    stream = TrainStream(config, vocabulary, seed=0, use_rationales=True)
    for batch in stream.batches(start_step=1000):
        ...

A batch depends on (config, seed, step) and on nothing else: not on the batches before it, the
hosts or the devices. To resume is to ask for the next step.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dslt.core.batch import (
    PAD_ID,
    ROLE_LABEL,
    ROLE_RATIONALE,
    SHARED_RATIONALE_START_ID,
    Batch,
    BatchCounts,
)
from dslt.data.packing import (
    START_IDS,
    PairOrder,
    RowShape,
    Segments,
    WindowPlan,
    build_batch,
    plan_window,
    share_sources,
)
from dslt.data.row_shape import suggest_row_shape
from dslt.data.target_layout import LABEL, MARK
from dslt.data.token_cache import (
    LABEL_TASK,
    RecordsIndex,
    TaskSettings,
    file_digest,
    open_index,
)
from dslt.data.train_set import TrainSet, open_train_set, token_warnings
from dslt.data.vocabulary import (
    SENTENCEPIECE_FILE,
    Vocabulary,
    encode_with_eos,
    load_vocabulary,
    remove_vocabulary,
    train_sentencepiece,
)
from dslt.errors import InputError
from dslt.records import SPLITS, EvalInput, Example, read_examples

KEPT_PLANS = 4  # windows: the current one, the one a prefetch is in, and two that were asked for


@dataclasses.dataclass(frozen=True)
class DataConfig(TaskSettings):
    """What a run reads, and how (see TaskSettings too).

    Attributes:
      records: JSONL files of records; a dataset lies in one file only.
      augmentation: more of them, of which the train split alone is used; none of their examples
        is judged.
      vocabulary: a SentencePiece file, a Hugging Face tokenizer's directory, `bytes`, or `train:N`
        for at most N pieces trained on the train splits of these records.
      train_fraction: the share of each dataset's train examples that is learnt from, in (0, 1]. By
        the run's seed, and a smaller share is a part of a larger one. Other splits stay whole, and
        so does what the vocabulary is trained on.
      shuffle_rationales: give every example the rationale of another one: a control, which keeps
        the text and takes the sense away.
      batch_examples: examples a step, each with its label and what rationales it has.
      source_length, target_length: of a packed row; suggested from the data where None.
      mixture_rates: dataset to rate, for all datasets that train; None: by number of examples.
      shared_encoder: encode an example once, for its label and its rationale. The source then names
        no task (both prefixes must be equal); the token that the decoder starts with does. Changes
        the method: cheaper, and not the paper's.
      cache_dir: of the token cache; where None, `token_cache` beside the first records file.
    """

    records: tuple[str, ...] = ()
    augmentation: tuple[str, ...] = ()
    vocabulary: str = ""
    train_fraction: float = 1.0
    shuffle_rationales: bool = False
    batch_examples: int = 64
    source_length: int | None = None
    target_length: int | None = None
    mixture_rates: Mapping[str, float] | None = None
    shared_encoder: bool = False
    cache_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.shared_encoder and self.input_prefix_label != self.input_prefix_rationale:
            raise InputError(
                f"DataConfig.shared_encoder is set, but input_prefix_label is "
                f"{self.input_prefix_label!r} and input_prefix_rationale "
                f"{self.input_prefix_rationale!r}; expected equal ones, such as '' (both tasks "
                "read the same source)"
            )
        if not 0 < self.train_fraction <= 1:
            raise InputError(
                f"DataConfig.train_fraction is {self.train_fraction}; expected above 0, at most 1"
            )

    @property
    def train_files(self) -> tuple[str, ...]:
        """All records files that are trained on. Raises InputError where `records` is empty."""
        return (*_records_paths(self), *self.augmentation)

    @property
    def rationale_start_id(self) -> int:
        """The token that the decoder of a rationale starts with."""
        return SHARED_RATIONALE_START_ID if self.shared_encoder else PAD_ID

    def task_settings(self) -> TaskSettings:
        """The part that the tokens depend on."""
        names = [field.name for field in dataclasses.fields(TaskSettings)]
        return TaskSettings(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Fill:
    """The share of a batch's cells that hold tokens, in [0, 1]."""

    source: float
    target: float


class TrainStream:
    """The endless stream of training batches.

    Attributes:
      vocabulary: what its tokens mean.
      row_shape: the shape of every batch.
      order: which pairs each window of steps sees.
      num_examples: pairs of an epoch, over all datasets.
      num_rationales: how many of them have a rationale segment, or several.
      left_out: pairs that found no room in the windows planned so far; each is left out of one
        epoch.
    """

    def __init__(
        self, config: DataConfig, vocabulary: Vocabulary, *, seed: int, use_rationales: bool
    ):
        """Opens or builds the token cache and settles the row shape.

        Args:
          seed: of the order of the examples.
          use_rationales: whether rationale segments are built; False where λ is 0.

        Raises:
          InputError: the settings, a file or the data cannot be used.
        """
        self.vocabulary = vocabulary
        if use_rationales and config.target_layout != LABEL:
            raise InputError(
                f"DataConfig.target_layout is {config.target_layout!r}, one target for label and "
                "rationale, and the rationale task is asked for as well; expected "
                f"train.TrainConfig.rationale_weight = 0, or target_layout {LABEL!r}"
            )
        self._sets = open_train_sets(config, vocabulary, use_rationales)
        if config.train_fraction < 1:
            self._sets = [part.take_fraction(config.train_fraction, seed) for part in self._sets]
        if config.shuffle_rationales:
            self._sets = [part.shuffle_rationales(seed) for part in self._sets]
        lengths = [train_set.lengths() for train_set in self._sets]
        width = max(part.shape[1] for part in lengths)
        self._lengths = np.concatenate(
            [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in lengths]
        )
        self._is_shared = config.shared_encoder
        self._start_ids = START_IDS | {ROLE_RATIONALE: config.rationale_start_id}
        self._offsets = np.cumsum([0] + [len(train_set.rows) for train_set in self._sets])
        self._seed = seed
        self.num_examples = len(self._lengths)
        self.num_rationales = int((self._lengths[:, 2] > 0).sum())
        if use_rationales and not self.num_rationales:
            raise InputError(
                f"none of the {self.num_examples} train examples of "
                f"{', '.join(config.train_files)} has a rationale; extract rationales first, or "
                "set rationale_weight to 0"
            )
        self.order = PairOrder(
            sizes=tuple(len(train_set.rows) for train_set in self._sets),
            rates=_rates(config, self._sets),
            batch_examples=config.batch_examples,
            seed=seed,
        )
        self.row_shape: RowShape = suggest_row_shape(
            self.order,
            self._planned_lengths(np.arange(self.num_examples)),
            config.source_length,
            config.target_length,
        )
        self._plans: dict[int, tuple[np.ndarray, WindowPlan]] = {}
        self._left_out: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def left_out(self) -> int:
        return sum(self._left_out.values())

    @property
    def num_rows(self) -> int:
        """Of every batch."""
        return self.row_shape.rows

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of one step, or some of its rows: one host's share (see `build_batch`)."""
        pairs, segments = self._segments(step)
        dataset = np.searchsorted(self._offsets, pairs, side="right") - 1
        weights = np.ones(len(pairs), np.float32)
        sources = []
        for number in np.unique(dataset):
            train_set = self._sets[number]
            for role, tables in (
                (ROLE_LABEL, train_set.label),
                (ROLE_RATIONALE, train_set.rationale),
            ):
                index = np.flatnonzero((dataset == number) & (segments.role == role))
                entry = pairs[index] - self._offsets[number]
                if role == ROLE_LABEL:
                    entry = train_set.label_entry[entry]
                else:
                    entry = train_set.rationale_entry[entry, segments.number[index] - 1]
                    weights[index] = train_set.rationale_weights[entry]
                if len(index):
                    sources.append((index, entry, *tables))
        return build_batch(segments, sources, self.row_shape, rows, self._start_ids, weights)

    def batches(
        self, start_step: int = 0, rows: np.ndarray | None = None, prefetch_batches: int = 2
    ) -> Iterator[Batch]:
        """Yields the batches from `start_step` on, without end; a thread works ahead."""
        steps = itertools.count(start_step)
        if prefetch_batches <= 0:
            yield from (self.batch(step, rows) for step in steps)
        with concurrent.futures.ThreadPoolExecutor(1, "batches") as pool:
            ahead = collections.deque(
                pool.submit(self.batch, next(steps), rows) for _ in range(prefetch_batches)
            )
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, next(steps), rows))
                yield batch

    def counts(self, step: int) -> BatchCounts:
        """What the whole batch of a step holds, without building it."""
        _, segments = self._segments(step)
        return BatchCounts(
            examples=int(np.sum(segments.role == ROLE_LABEL)),
            source_tokens=int(segments.source_length.sum()),
            target_tokens=int(segments.target_length.sum()),
        )

    def mean_example_tokens(self) -> tuple[float, float]:
        """Source and target tokens of an example, both tasks together, on average."""
        source, target = (self._lengths[:, side::2].sum() for side in (0, 1))
        return source / self.num_examples, target / self.num_examples

    def examples(self, step: int) -> list[str]:
        """The ids of a step's examples, `dataset/id`, to reproduce a batch; sorted."""
        pairs, segments = self._segments(step)
        return sorted(self._example_id(pair) for pair in pairs[segments.role == ROLE_LABEL])

    def fill(self) -> Fill:
        """How full the batches of the first window are on average."""
        steps = range(self.order.window_batches)
        tokens = np.zeros(2)
        for step in steps:
            _, segments = self._segments(step)
            tokens += segments.source_length.sum(), segments.target_length.sum()
        sides = (self.row_shape.source_length, self.row_shape.target_length)
        return Fill(*(tokens / len(steps) / self.row_shape.rows / sides).tolist())

    @property
    def records_digests(self) -> dict[str, str]:
        """Path to sha256 hex of each records file that is trained on."""
        return {str(train_set.index.path): train_set.index.digest for train_set in self._sets}

    def report(self) -> list[str]:
        """What was read, cut and not understood, in lines to print when a run starts."""
        fill = self.fill()
        shape = self.row_shape
        lines = [
            f"{self.num_examples} examples, {self.num_rationales} with a rationale; a batch is "
            f"{self.order.batch_examples} examples in {shape.rows} rows of {shape.source_length} "
            f"source and {shape.target_length} target tokens, filled {fill.source:.3f} and "
            f"{fill.target:.3f}"
        ]
        for train_set in self._sets:
            if train_set.num_unlabelled:
                lines.append(
                    f"warning: {train_set.name}: {train_set.num_unlabelled} train examples have no "
                    "label and are left out"
                )
            lines += token_warnings(train_set.counts)
        return lines

    def _segments(self, step: int) -> tuple[np.ndarray, Segments]:
        """The pair ids [n] and the segments of one step."""
        if step < 0:
            raise InputError(f"step is {step}; expected zero or more")
        window, number = divmod(step, self.order.window_batches)
        pairs, plan = self._plan(window)
        bounds = np.searchsorted(plan.segments.batch, [number, number + 1])
        segments = plan.segments.where(slice(*bounds))
        return pairs[segments.pair], segments

    def _plan(self, window: int) -> tuple[np.ndarray, WindowPlan]:
        found = self._plans.get(window)
        if found:  # without waiting for a thread that plans the next window
            return found
        with self._lock:
            if window not in self._plans:
                pairs = self.order.window(window)
                plan = plan_window(
                    self._planned_lengths(pairs),
                    self.row_shape,
                    self.order.window_batches,
                    key=(self._seed, window),
                )
                if self._is_shared:
                    segments = share_sources(plan.segments, self._lengths[pairs])
                    plan = dataclasses.replace(plan, segments=segments)
                self._left_out[window] = len(plan.left_out)
                self._plans[window] = (pairs, plan)
                while len(self._plans) > KEPT_PLANS:
                    del self._plans[next(iter(self._plans))]
            return self._plans[window]

    def _planned_lengths(self, pairs: np.ndarray) -> np.ndarray:
        """[n, 2 + 2R]: the lengths of pairs; if shared, one source and both targets together."""
        lengths = self._lengths[pairs]
        if self._is_shared:
            lengths[:, 1] += lengths[:, 3]
            lengths[:, 2:4] = 0
        return lengths

    def _example_id(self, pair: int) -> str:
        number = int(np.searchsorted(self._offsets, pair, side="right")) - 1
        train_set = self._sets[number]
        row = int(train_set.rows[pair - self._offsets[number]])
        return f"{train_set.name}/{train_set.index.example_id(row)}"


def make_vocabulary(config: DataConfig, keep_in: str | os.PathLike) -> Vocabulary:
    """The vocabulary of a new run, opened or trained, and copied into its directory.

    A copy that an attempt before left in `keep_in`, perhaps of another kind, is replaced.

    Raises:
      InputError: not a vocabulary, or a file among those that would be replaced.
    """
    keep_in = Path(keep_in)
    source = Path(os.path.realpath(config.vocabulary))
    kept = Path(os.path.realpath(keep_in))
    if source == kept:
        return load_vocabulary(keep_in)
    if source.is_file() and source.parent == kept:
        raise InputError(
            f"vocabulary is {config.vocabulary!r}, a file in {keep_in}, where the run keeps its "
            f"own copy: give the directory, {str(keep_in)!r}, or move the file elsewhere"
        )
    kind, _, size = config.vocabulary.partition(":")
    if kind == "train":
        if not re.fullmatch(r"\d{1,9}", size):
            raise InputError(
                f"vocabulary is {config.vocabulary!r}; expected a number of pieces: train:8000"
            )
        texts = list(_train_texts(config))  # read before anything is replaced
        remove_vocabulary(keep_in)
        return train_sentencepiece(texts, int(size), keep_in / SENTENCEPIECE_FILE)
    vocabulary = load_vocabulary(config.vocabulary)
    remove_vocabulary(keep_in)
    vocabulary.save(keep_in)
    return vocabulary


def open_train_sets(
    config: DataConfig, vocabulary: Vocabulary, use_rationales: bool
) -> list[TrainSet]:
    """The datasets that have something to train on, sorted by name.

    Raises:
      InputError: no records file, a dataset in two files, or no train example with a label.
    """
    settings = config.task_settings()
    cache_dir = config.cache_dir or Path(_records_paths(config)[0]).parent / "token_cache"
    file_of_dataset: dict[str, RecordsIndex] = {}
    for path in config.train_files:
        index = open_index(cache_dir, path)
        for name in index.datasets:
            if name in file_of_dataset:
                raise InputError(
                    f"dataset {name!r} is in {file_of_dataset[name].path} and in {path}; put it "
                    "into one file, or rename it in one of them"
                )
            file_of_dataset[name] = index
    train_sets = [
        open_train_set(index, name, vocabulary, settings, cache_dir, use_rationales)
        for name, index in sorted(file_of_dataset.items())
        if "train" in index.task_examples(name, LABEL_TASK, settings)
    ]
    if not train_sets:
        raise InputError(
            f"{', '.join(config.train_files)}: no example of split 'train' has a "
            f"{config.label_source} label; expected some to learn from. Look at the fields split, "
            "label and teacher_label"
        )
    return train_sets


def eval_inputs(config: DataConfig, split: str, vocabulary: Vocabulary) -> list[EvalInput]:
    """All examples of a split in the order of the files, also those without a gold label.

    The tokens are those of the SeqIO Tasks (a test compares them), made by the vocabulary itself:
    a Task has no examples without a target.

    Raises:
      InputError: the split is none of SPLITS, or no records file has an example in it.
    """
    return read_eval_inputs(config, (split,), vocabulary)[split]


def read_eval_inputs(
    config: DataConfig, splits: Sequence[str], vocabulary: Vocabulary
) -> dict[str, list[EvalInput]]:
    """`eval_inputs` of several splits in one pass; those without an example are left out.

    Raises:
      InputError: a split is none of SPLITS, or no records file has an example in any.
    """
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    found = {split: [] for split in splits}
    numbers: collections.Counter = collections.Counter()
    for path in _records_paths(config):
        for example in read_examples(path):
            numbers[example.split] += 1
            if example.split in found:
                found[example.split].append(encode_example(config, example, vocabulary))
    if not any(found.values()):
        there = ", ".join(f"{number} in {name}" for name, number in numbers.items())
        raise InputError(
            f"{', '.join(config.records)}: no example is in split {' or '.join(map(repr, splits))} "
            f"({there}); give records that have one, or another split"
        )
    return {split: examples for split, examples in found.items() if examples}


def records_digests(paths: Sequence[str]) -> dict[str, str]:
    """Path to sha256 hex of each records file, as `TrainStream.records_digests` has it."""
    return {str(path): file_digest(path) for path in map(Path, paths)}


def count_splits(config: DataConfig) -> collections.Counter:
    """How many examples each split has, over all records files."""
    return collections.Counter(
        example.split for path in _records_paths(config) for example in read_examples(path)
    )


def encode_example(config: DataConfig, example: Example, vocabulary: Vocabulary) -> EvalInput:
    """Tokenizes one example for both tasks."""
    (label, is_label_cut), (rationale, is_rationale_cut) = (
        encode_with_eos(vocabulary, prefix + example.input, config.max_input_length)
        for prefix in (config.input_prefix_label, config.input_prefix_rationale)
    )
    return EvalInput(example, label, rationale, is_label_cut or is_rationale_cut)


def _train_texts(config: DataConfig) -> Iterator[str]:
    if config.target_layout != LABEL:
        yield MARK[config.target_layout]
    for path in config.train_files:
        for example in read_examples(path):
            if example.split != "train":
                continue
            yield config.input_prefix_label + example.input
            yield config.input_prefix_rationale + example.input
            yield from filter(None, (example.label, example.teacher_label))
            yield from (rationale.text for rationale in example.rationales())


def _records_paths(config: DataConfig) -> tuple[str, ...]:
    if not config.records:
        raise InputError("no records file is given; expected at least one path in records")
    return tuple(config.records)


def _rates(config: DataConfig, train_sets: list[TrainSet]) -> tuple[float, ...]:
    names = [train_set.name for train_set in train_sets]
    if config.mixture_rates is None:
        return tuple(float(len(train_set.rows)) for train_set in train_sets)
    if sorted(config.mixture_rates) != sorted(names):
        raise InputError(
            f"mixture_rates names {', '.join(sorted(config.mixture_rates)) or 'nothing'}; expected "
            f"exactly the datasets that have train examples: {', '.join(names)}"
        )
    return tuple(float(config.mixture_rates[name]) for name in names)
