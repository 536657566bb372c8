"""WebVid-2M (Bain et al., 2021): stock footage with its descriptions.

2.5 million clips to train, 5,000 to validate.
"""

from __future__ import annotations

import pathlib

from vlp_jax.data.builders import manual, videos

_SOURCE = "https://github.com/m-bain/webvid"
_LISTS = {"train": "results_2M_train.csv", "validation": "results_2M_val.csv"}


class Webvid(videos.VideoBuilder, skip_registration=True):
  """Builder of `webvid`."""

  name = "webvid"
  SOURCE = _SOURCE
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"{' and '.join(_LISTS.values())}, and the clips as "
    f"videos/<page_dir>/<videoid>.mp4; see {_SOURCE}"
  )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    *lists, clips = manual.require(
      folder, [(name, _SOURCE) for name in (*_LISTS.values(), "videos")]
    )
    return {
      name: videos.split(clips, _read(path))
      for name, path in zip(_LISTS, lists, strict=True)
    }


def _read(path: pathlib.Path) -> dict[str, videos.Clip]:
  """Reads a list: columns videoid, contentUrl, duration, page_dir, name."""
  return {
    row["videoid"]: videos.Clip(
      f"{row['page_dir']}/{row['videoid']}.mp4", [row["name"]]
    )
    for row in videos.table(path, ["videoid", "page_dir", "name"])
  }


BUILDERS = {"webvid": Webvid}
