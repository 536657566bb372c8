"""Pictures whose colour tells them apart, and a TFDS data set of them."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

COLORS = ("red", "green", "blue", "yellow", "purple")


def png(color, size=(16, 16)) -> bytes:
  """Encodes a picture of one colour."""
  file = io.BytesIO()
  Image.new("RGB", size, color).save(file, "PNG")
  return file.getvalue()


def gray(index: int):
  """The colour of picture `index`, which tells it from the others."""
  return (index % 256, index // 256, 100)


def assert_equal(actual, expected):
  """Batches that agree in every field."""
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


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
