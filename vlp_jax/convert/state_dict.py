"""Reads state dicts: .npz, .safetensors, and what `torch.save` wrote."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np

from vlp_jax.errors import UserError

# Keys under which training programs keep the weights beside other things.
WRAPPERS = ("model", "state_dict")
# Classes, no tensors, by which PyTorch Lightning's checkpoints name callbacks.
_LIGHTNING = (
  "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
  "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
)


class _Name:
  """Stands for such a class, and does nothing."""


def read(path: str) -> dict[str, np.ndarray]:
  """Reads a state dict of arrays.

  Names of norms are PyTorch's, as they are not in BERT's first files. Nothing
  in a pickle is run: PyTorch reads with `weights_only=True`.

  Raises:
    UserError: if the file is missing, or of no kind that can be read here.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise UserError(f"{path}: no such file")
  try:
    state = _READERS.get(file.suffix, _read_torch)(file)
  except ImportError as error:
    raise UserError(
      f"{path} needs {error.name}: pip install {error.name}"
    ) from None
  except Exception as error:  # readers raise all sorts on damaged files
    hint = ""
    if "TorchScript" in str(error):
      hint = (
        "; OpenAI's CLIP is a program and not a state dict: if you trust it, "
        "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OTHER)"
      )
    raise UserError(f"{path} cannot be read ({error}){hint}") from error
  old = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
  }
  for ending, new in old.items():
    state = {
      name.removesuffix(ending) + new if name.endswith(ending) else name: array
      for name, array in state.items()
    }
  return state


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(file) as arrays:
    return {name: arrays[name] for name in arrays}


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors.numpy

  return safetensors.numpy.load_file(file)


def _read_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
  import torch

  allowed = [(_Name, name) for name in _LIGHTNING]
  with torch.serialization.safe_globals(allowed):
    state = torch.load(file, map_location="cpu", weights_only=True)
  for name in WRAPPERS:
    state = state.get(name, state)
  return {k: v.float().numpy() for k, v in state.items()}


_READERS: dict[str, Callable[[pathlib.Path], dict[str, np.ndarray]]] = {
  ".npz": _read_npz,
  ".safetensors": _read_safetensors,
}
