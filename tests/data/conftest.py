"""Small data sets: pictures with captions, as JSONL and as TFDS."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlp_jax import config as config_lib

COLORS = ("red", "green", "blue", "yellow", "purple")


def png(color, size=(16, 16)) -> bytes:
  """Encodes a picture of one colour."""
  file = io.BytesIO()
  Image.new("RGB", size, color).save(file, "PNG")
  return file.getvalue()


def gray(index: int):
  """The colour of picture `index`, which tells it from the others."""
  return (index % 256, index // 256, 100)


class Toy(tfds.core.GeneratorBasedBuilder):
  """Pictures whose colour is their number, with two captions each."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = {}  # noqa: RUF012 - TFDS's protocol
  counts = {"train": 20, "validation": 6}  # noqa: RUF012

  def extra_features(self):
    return {}

  def extra(self, index):
    del index
    return {}

  def _info(self):
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "image/filename": text,
          "captions": tfds.features.Sequence({"text": text, "id": np.int64}),
          "label": tfds.features.ClassLabel(names=["even", "odd"]),
          **self.extra_features(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {k: self._generate_examples(n) for k, n in self.counts.items()}

  def _generate_examples(self, count):
    for i in range(count):
      captions = [f"a naïve picture {i}", f"number {i}"]
      yield (
        i,
        {
          "image": io.BytesIO(png(gray(i))),
          "image/filename": f"{i}.png",
          "captions": [{"text": c, "id": 7} for c in captions],
          "label": i % 2,
          **self.extra(i),
        },
      )


def build(builder_class, directory):
  """Builds a TFDS data set in ArrayRecord files."""
  builder = builder_class(data_dir=directory, file_format="array_record")
  builder.download_and_prepare()
  return builder


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory):
  """A TFDS data directory that holds `toy`."""
  directory = tmp_path_factory.mktemp("tfds")
  build(Toy, directory)
  return directory


@pytest.fixture
def toy_tfds(toy_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(toy_dir))
  return toy_dir


@pytest.fixture
def write_jsonl(tmp_path):
  """Writes rows (dicts, or raw lines) as a list, and returns its path.

  Pictures are made for rows whose `image` is missing: `images/<row>.png`.
  """

  def write(rows, name="pairs.jsonl"):
    (tmp_path / "images").mkdir(exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
      if isinstance(row, dict) and not {"image", "file_name"} & {*row}:
        row = {"image": f"images/{i}.png", **row}
        (tmp_path / row["image"]).write_bytes(png(gray(i)))
      lines.append(row if isinstance(row, str) else json.dumps(row))
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

  return write


@pytest.fixture
def config():
  """The common config, with a small batch and small pictures."""
  config = config_lib.default_config()
  config.batch_size = 8
  config.data.image_size = 16
  config.tokenizer.max_len = 12
  return config


@pytest.fixture
def jsonl_config(config, write_jsonl):
  """A config whose data are 20 pictures, number i of colour `gray(i)`."""
  rows = [
    {"captions": [f"a {COLORS[i % 5]} thing", f"number {i}"], "split": "train"}
    for i in range(20)
  ]
  config.data.source = str(write_jsonl(rows))
  return config
