"""A folder of pictures with captions in `.txt` files beside them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from vlp_jax.data import intake
from vlp_jax.data.prepare import entries

SUFFIXES = frozenset(
  (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif"),
    *(".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".j2k", ".mpo", ".ico", ".tga"),
  )
)


def scan(folder: pathlib.Path, tally: entries.Tally) -> Iterator[entries.Entry]:
  """Yields the pictures in a folder and those below, in order of their names.

  `a/b.jpg` has its caption in `a/b.txt`. Other files are left alone, hidden
  ones and folders too.
  """
  for relative in _walk(str(folder), ""):
    name = entries.text_id(relative)
    tally.read += 1
    try:
      intake.inside(folder, relative)
      try:
        text = intake.read(folder, os.path.splitext(relative)[0] + ".txt")
      except intake.Rejected as e:
        raise intake.Rejected("no caption file") from e
      yield entries.Entry(
        name=name,
        image_id=name,
        split="",
        place=entries.Place(relative, str(folder)),
        captions=entries.clean_captions([text], name, tally),
        extra={},
      )
    except intake.Rejected as e:
      tally.skip(name, e.reason)


def _walk(root: str, below: str) -> Iterator[str]:
  """Yields relative paths named like pictures; folders so named as well."""
  with os.scandir(os.path.join(root, below)) as found:
    items = sorted(found, key=lambda item: item.name)
  for item in items:
    if item.name.startswith("."):
      continue
    path = os.path.join(below, item.name)
    if os.path.splitext(item.name)[1].lower() in SUFFIXES:
      yield path
    elif item.is_dir(follow_symlinks=False):
      yield from _walk(root, path)
