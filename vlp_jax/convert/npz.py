"""Files of parameters that converters write."""

from __future__ import annotations

import os
import pathlib
import uuid
from typing import Any

import numpy as np
from flax import traverse_util

from vlp_jax import command
from vlp_jax.errors import UserError


def check_name(path: pathlib.Path) -> None:
  """Raises a `UserError` unless a file is called .npz."""
  if path.suffix != ".npz":
    raise UserError(f"{path}: what is written is a .npz file; name it so")


def write(path: pathlib.Path, params: dict[str, Any]) -> int:
  """Writes a tree of arrays, whole or not at all.

  Args:
    path: of the file; its folder is made.
    params: names become paths, such as `vision/patch/kernel`.

  Returns:
    The number of parameters.

  Raises:
    UserError: if the folder cannot be written to.
  """
  command.make_folder(path.parent)
  arrays = traverse_util.flatten_dict(params, sep="/")
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    with temporary.open("wb") as file:
      np.savez(file, **arrays)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return sum(array.size for array in arrays.values())
