"""LSMDC 2016: clips of films and what happens in them (Rohrbach et al., 2017).

101,046 clips to train, 7,408 to validate, 1,000 to test retrieval (the public
challenge). Names in captions are replaced by SOMEONE.
"""

from __future__ import annotations

import pathlib

from vlp_jax.data.builders import manual, videos
from vlp_jax.data.prepare.entries import Tally
from vlp_jax.errors import UserError

_SOURCE = "https://sites.google.com/site/describingmovies/download"
_LISTS = {
  "train": "LSMDC16_annos_training.csv",
  "validation": "LSMDC16_annos_val.csv",
  "test": "LSMDC16_challenge_1000_publictect.csv",
}
_COLUMNS = 6  # clip, start and end as aligned, as extracted, sentence


class Lsmdc(videos.VideoBuilder, skip_registration=True):
  """Builder of `lsmdc`."""

  name = "lsmdc"
  SOURCE = _SOURCE
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"{', '.join(_LISTS.values())}, and the clips in a folder for each film, "
    "videos/0001_American_Beauty/0001_American_Beauty_00.00.51.926-"
    f"00.00.54.129.avi, from {_SOURCE}, which gives access on request"
  )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    *lists, clips = manual.require(
      folder, [(name, _SOURCE) for name in (*_LISTS.values(), "videos")]
    )
    return {
      name: _split(path, clips)
      for name, path in zip(_LISTS, lists, strict=True)
    }


def _split(path: pathlib.Path, folder: pathlib.Path) -> manual.Split:
  """Reads a list: tabs, no header, no quoting; a clip may be in many lines."""
  tally, captions = Tally(), {}
  for name, line in manual.lines(path):
    values = line.rstrip(b"\r\n").split(b"\t")
    if len(values) != _COLUMNS:
      tally.skip(name, f"not {_COLUMNS} columns")
      continue
    clip = values[0].decode("utf-8", "replace")
    captions.setdefault(clip, []).append(values[-1])
  if not captions:
    raise UserError(
      f"{path}: no line has {_COLUMNS} columns between tabs; get it again"
    )
  tally.read = tally.num_skipped  # the others are counted with their clips
  found = videos.split(
    folder,
    {i: videos.Clip(_file(i), texts) for i, texts in captions.items()},
  )
  found.tally = tally
  return found


def _file(clip: str) -> str:
  """`0001_A_Film_00.00.51.926-...` is in the folder of `0001_A_Film`."""
  film = clip.partition(".")[0].rpartition("_")[0]
  return f"{film}/{clip}.avi"


BUILDERS = {"lsmdc": Lsmdc}
