"""TFDS builders; `python -m vlp_jax.data.build` makes what they describe.

A module offers its data sets in `BUILDERS`: their names, `name` or
`name/config`, and functions of `data_dir` and `file_format` that return a
builder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

# Made at first use, by the modules of these names.
EMBEDDED = ("scenes", "scenes_video")
# Built by TFDS's own code.
OF_TFDS = ("imagenet2012", "cifar10", "cifar100")


def constructors() -> dict[str, Callable[..., Any]]:
  """Returns all data sets that modules here offer, by name."""
  found: dict[str, Callable[..., Any]] = {}
  for module in pkgutil.iter_modules(__path__):
    imported = importlib.import_module(f"{__name__}.{module.name}")
    found |= getattr(imported, "BUILDERS", {})
  return dict(sorted(found.items()))


def command(name: str) -> str:
  """Returns the command that builds a data set, or "" if there is none."""
  name = name.partition(":")[0]
  if name not in (*constructors(), *OF_TFDS):
    return ""
  return f"python -m vlp_jax.data.build --name={name} --manual_dir=DIR"
