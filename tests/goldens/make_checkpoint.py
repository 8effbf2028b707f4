"""Writes the golden checkpoint of today's format, which later versions must load.

    python tests/goldens/make_checkpoint.py    # once a format: goldens/checkpoints/format_2/5

Every format's golden holds the same state: AdamW's at its start, of a model from seed 0, at step 5.
"""

from pathlib import Path

import jax

from dslt.checkpoint.layout import FORMAT_VERSION, Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.core import t5
from dslt.core.optimizer import OptimizerConfig, make_optimizer
from dslt.core.train_step import init_state

CONFIG = t5.T5Config(
    vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_heads=2, num_layers=1, num_decoder_layers=1,
    relative_attention_num_buckets=4,
)  # fmt: skip


def main() -> None:
    directory = Path(__file__).parent / "checkpoints" / f"format_{FORMAT_VERSION}"
    state = init_state(
        t5.init_params(CONFIG, seed=0)[1], make_optimizer(OptimizerConfig(), num_steps=9)
    )
    with CheckpointManager(directory, together=True) as manager:
        manager.save(state._replace(step=jax.numpy.int32(5)), Layout(CONFIG))


if __name__ == "__main__":
    main()
