"""A file for pictures that cannot be read where they stand.

Cells of Parquet files and members of compressed tars have no place of their
own on the disk that could be gone to directly.
"""

from __future__ import annotations

import pathlib

from vlp_jax.data.prepare.entries import Place


class Spill:
  """Collects pictures in one file, as long as it is open."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file = None

  def add(self, data: bytes) -> Place:
    """Writes a picture and returns its place."""
    if self._file is None:
      self._file = self._path.open("wb")
    offset = self._file.tell()
    self._file.write(data)
    return Place(str(self._path), "", offset, len(data))

  def __enter__(self) -> Spill:
    return self

  def __exit__(self, *exc) -> None:
    if self._file is not None:
      self._file.close()
