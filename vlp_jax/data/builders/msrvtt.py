"""MSR-VTT (Xu et al., 2016) in the split of JSFusion (Yu et al., 2018).

"1k-A": 9,000 clips to train with 20 captions each, 1,000 to test with one.
"""

from __future__ import annotations

import pathlib

from vlp_jax.data.builders import manual, videos

_CLIPS = (
  "https://www.microsoft.com/en-us/research/publication/"
  "msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/"
)
_LISTS = "https://github.com/ArrowLuo/CLIP4Clip#data-preparing"
_TRAIN, _TEST = "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"
_CAPTIONS, _FOLDER = "MSRVTT_data.json", "videos/all"


class Msrvtt(videos.VideoBuilder, skip_registration=True):
  """Builder of `msrvtt`."""

  name = "msrvtt"
  SOURCE = _CLIPS
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"{_CAPTIONS}, {_TRAIN} and {_TEST}, from {_LISTS}, and the clips "
    f"{_FOLDER}/video0.mp4 ..., from {_CLIPS}"
  )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    lists = [(name, _LISTS) for name in (_CAPTIONS, _TRAIN, _TEST)]
    listing, train, test, clips = manual.require(
      folder, [*lists, (_FOLDER, _CLIPS)]
    )
    captions: dict[str, list] = {}
    for row in manual.load(listing, "sentences"):
      captions.setdefault(row.get("video_id"), []).append(row.get("caption"))
    to_train = {
      row["video_id"]: captions.get(row["video_id"], [])
      for row in videos.table(train, ["video_id"])
    }
    # A clip that is listed twice has both captions.
    to_test: dict[str, list] = {}
    for row in videos.table(test, ["video_id", "sentence"]):
      to_test.setdefault(row["video_id"], []).append(row["sentence"])
    return {
      split: videos.split(
        clips,
        {i: videos.Clip(f"{i}.mp4", texts) for i, texts in found.items()},
      )
      for split, found in (("train", to_train), ("test", to_test))
    }


BUILDERS = {"msrvtt": Msrvtt}
