"""Converts an exported student to CTranslate2, with the probabilities that it had.

    pip install 'dslt[ctranslate2]'
    python launch/to_ctranslate2.py runs/facts/student runs/facts/student_int8 --quantization int8

ctranslate2's own converter takes the scale of the output layer from `tie_word_embeddings`, which
transformers 5 sets to true in every T5 that it loads: the greedy tokens stay the same, but the
logits are multiplied by d_model ** -0.5, and so scores and beam searches are others. Here the scale
is what config.json says.
"""

import argparse
from collections.abc import Sequence

from ctranslate2.converters import TransformersConverter


class StudentConverter(TransformersConverter):
    """Leaves the output layer's scale as it was."""

    def load_model(self, *args, **kwargs):
        model = super().load_model(*args, **kwargs)
        is_scaled = getattr(model.config, "scale_decoder_outputs", None)
        if is_scaled is not None:
            model.config.tie_word_embeddings = is_scaled
        return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="a directory of `dslt export`")
    parser.add_argument("output_dir", help="made")
    parser.add_argument("--quantization", help="int8, int8_float32, …; none: float32")
    args = parser.parse_args(argv)
    StudentConverter(args.student).convert(args.output_dir, quantization=args.quantization)


if __name__ == "__main__":
    main()
