"""A small random T5 as we hold it and, where PyTorch is installed, as `transformers` does."""

from pathlib import Path

import pytest

from dslt.checkpoint import hf_t5
from dslt.core import t5

GOLDEN = Path(__file__).parents[1] / "goldens" / "t5_v1_1"  # 32 ids; its answers end early and late


@pytest.fixture(scope="session")
def golden_t5():
    """(graphdef, params)."""
    config, params = hf_t5.load_params(GOLDEN)
    return t5.abstract_params(config)[0], params


@pytest.fixture(scope="module")
def transformers_t5():
    """The same weights."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch: pip install '.[parity]'")
    transformers = pytest.importorskip("transformers")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products so small are done before a second thread wakes up
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(GOLDEN, dtype=torch.float32)
    yield model.eval()
    torch.set_num_threads(num_threads)
