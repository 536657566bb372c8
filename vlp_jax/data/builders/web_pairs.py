"""Pictures from the web with their alt texts: CC3M, CC12M and SBU.

Their owners hand out lists of URLs; img2dataset downloads the pictures into
webdataset shards, which are read here: `<manual_dir>/<name>/*.tar`.
"""

from __future__ import annotations

import hashlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import manual
from vlp_jax.data.prepare import tars
from vlp_jax.data.prepare.entries import Entry, Tally
from vlp_jax.data.prepare.lists import Columns
from vlp_jax.data.prepare.spill import Spill
from vlp_jax.errors import UserError

_CC3M = "https://ai.google.com/research/ConceptualCaptions/download"
_CC12M = "https://github.com/google-research-datasets/conceptual-12m"
_SBU = "https://www.cs.rice.edu/~vo9/sbucaptions/"
# The split is always train; the pictures' URLs say which they are.
_COLUMNS = Columns(split="-", keep=("url",))


class WebPairs(manual.ManualBuilder, skip_registration=True):
  """Base of the builders of web pairs; all pairs are in `train`.

  Attributes:
    SOURCE: the page that has the list of URLs.
    LIST: img2dataset's options for that list.
  """

  SOURCE = ""
  LIST = ""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.name}: pictures from the web with alt texts.",
      homepage=self.SOURCE,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "image_id": np.int64,
          "url": tfds.features.Text(),
        }
      ),
    )

  def splits(self, folder: pathlib.Path) -> dict[str, manual.Split]:
    shards = sorted((folder / self.name).glob("*.tar"))
    if not shards:
      raise UserError(
        f"missing {folder / self.name}/*.tar; with the list from "
        f"{self.SOURCE}, make them with: img2dataset {self.LIST} "
        f"--output_format=webdataset --output_folder={folder / self.name} "
        "--image_size=256"
      )
    # Removed with the builder: pictures may be read from it until then.
    self._scratch = tempfile.TemporaryDirectory()
    scratch, tally = pathlib.Path(self._scratch.name), Tally()
    rows = _rows(shards, scratch, tally)
    return {"train": manual.Split(rows, _example, tally)}


def _rows(
  shards: list[pathlib.Path], scratch: pathlib.Path, tally: Tally
) -> Iterator[manual.Row]:
  """Yields the entries of all shards; `tally` counts what is none."""
  for path in shards:
    seen = Tally()
    with Spill(scratch / path.name) as spill:
      entries = list(tars.scan(path, _COLUMNS, seen, spill))
    seen.read -= len(entries)  # counted again when their pictures are read
    tally.add(seen)
    for entry in entries:
      yield entry.name, entry


def _example(name: str, entry: Entry, tally: Tally) -> dict[str, Any]:
  del name, tally
  return {
    "image": intake.picture(entry.place.read()),
    "captions": entry.captions,
    "image_id": _number(entry.image_id),
    "url": str(entry.extra.get("url") or ""),
  }


def _number(image_id: str) -> int:
  """Returns img2dataset's number, or one that is made of another name."""
  if image_id.isdecimal() and len(image_id) < 19:
    return int(image_id)
  digest = hashlib.sha256(image_id.encode()).digest()
  return int.from_bytes(digest[:4], "little") >> 1


class Cc3m(WebPairs, skip_registration=True):
  """Builder of `cc3m`: Conceptual Captions (Sharma et al., 2018)."""

  name = "cc3m"
  SOURCE = _CC3M
  LIST = (
    "--url_list=cc3m.tsv --input_format=tsv --url_col=url --caption_col=caption"
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = f"cc3m/*.tar; the list is at {_CC3M}"


class Cc12m(WebPairs, skip_registration=True):
  """Builder of `cc12m`: Conceptual 12M (Changpinyo et al., 2021)."""

  name = "cc12m"
  SOURCE = _CC12M
  LIST = (
    "--url_list=cc12m.tsv --input_format=tsv --url_col=url "
    "--caption_col=caption"
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = f"cc12m/*.tar; the list is at {_CC12M}"


class Sbu(WebPairs, skip_registration=True):
  """Builder of `sbu`: SBU captions (Ordonez et al., 2011)."""

  name = "sbu"
  SOURCE = _SBU
  LIST = (
    "--url_list=sbu-captions-all.json --input_format=json "
    "--url_col=image_urls --caption_col=captions"
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = f"sbu/*.tar; the list is at {_SBU}"


BUILDERS = {"cc3m": Cc3m, "cc12m": Cc12m, "sbu": Sbu}
