"""Parameters that a new run starts from."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp_jax.errors import UserError


def load(params: dict[str, Any], path: str) -> dict[str, Any]:
  """Puts arrays of a file into new parameters; the rest stays as it is.

  Args:
    params: of a new model, a tree of dicts.
    path: an .npz file with names such as `vision/patch/kernel`, as
      `python -m vlp_jax.convert.albef` writes it.

  Raises:
    UserError: if the file cannot be read, or holds an array that the model
      has not, or in another shape.
  """
  try:
    with np.load(pathlib.Path(path).expanduser()) as file:
      arrays = {name: np.asarray(file[name], np.float32) for name in file}
  except (OSError, ValueError, EOFError) as error:
    raise UserError(
      f"config.model.start={path}: no .npz file of parameters ({error})"
    ) from None
  for name, array in arrays.items():
    params = _put(params, name.split("/"), array, f"{path}: {name}")
  return params


def _put(tree: Any, names: list[str], array: np.ndarray, what: str):
  if not names:
    if isinstance(tree, Mapping) or array.shape != tree.shape:
      shape = "a folder" if isinstance(tree, Mapping) else tree.shape
      raise UserError(f"{what} is {array.shape}, and in this model {shape}")
    return array
  if not isinstance(tree, Mapping) or names[0] not in tree:
    raise UserError(f"{what} is no parameter of this model")
  return {**tree, names[0]: _put(tree[names[0]], names[1:], array, what)}
