"""A folder of pictures, or clips, with captions in `.txt` files beside them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from vlp_jax.data import intake
from vlp_jax.data.prepare import entries


def scan(
  folder: pathlib.Path, tally: entries.Tally, clips: bool = False
) -> Iterator[entries.Entry]:
  """Yields the pictures in a folder and those below, in order of their names.

  `a/b.jpg` has its caption in `a/b.txt`. Other files are left alone, hidden
  ones and folders too. Of clips, `a/b.mp4` or a folder of frames, `a/b`, has
  it there.
  """
  for relative in _walk(str(folder), "", clips):
    name = entries.text_id(relative)
    tally.read += 1
    is_frames = clips and (folder / relative).is_dir()
    stem = relative if is_frames else os.path.splitext(relative)[0]
    try:
      if not is_frames:
        intake.inside(folder, relative)
      try:
        text = intake.read(folder, stem + ".txt")
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


def _walk(root: str, below: str, clips: bool) -> Iterator[str]:
  """Yields relative paths named like pictures; folders so named as well.

  Of clips, those named like clips, and folders with a text beside them.
  """
  suffixes = intake.CLIPS if clips else intake.PICTURES
  with os.scandir(os.path.join(root, below)) as found:
    items = sorted(found, key=lambda item: item.name)
  for item in items:
    if item.name.startswith("."):
      continue
    path = os.path.join(below, item.name)
    is_folder = item.is_dir(follow_symlinks=False)
    if os.path.splitext(item.name)[1].lower() in suffixes or (
      clips and is_folder and os.path.isfile(os.path.join(root, path + ".txt"))
    ):
      yield path
    elif is_folder:
      yield from _walk(root, path, clips)
