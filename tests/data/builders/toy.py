"""What the tests of builders share: small pictures, building, reading."""

import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlp_jax.data import build
from vlp_jax.errors import UserError


def picture(seed=0, kind="JPEG", size=(24, 16)):
  """Returns an encoded picture of random colours."""
  width, height = size
  rng = np.random.default_rng(seed)
  pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  return buffer.getvalue()


def put(path, content):
  """Writes bytes, or an object as JSON; makes the folders."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if not isinstance(content, bytes):
    content = json.dumps(content).encode()
  path.write_bytes(content)


def put_lines(path, rows):
  """Writes objects as JSON lines; bytes as they are."""
  rows = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
  put(path, b"\n".join(rows) + b"\n")


def make(name, tmp_path):
  """Builds a data set from `tmp_path/manual` into `tmp_path/data`."""
  return build.build(name, str(tmp_path / "manual"), str(tmp_path / "data"))


def read(builder, split="train"):
  """Returns the records of a split, pictures encoded, texts as str."""
  images = [
    name
    for name, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.Image)
  ]
  source = builder.as_data_source(
    split, decoders={name: tfds.decode.SkipDecoding() for name in images}
  )
  return [
    {k: v if k in images else _plain(v) for k, v in example.items()}
    for example in source
  ]


def _plain(value):
  if isinstance(value, bytes):
    return value.decode()
  value = np.asarray(value).tolist()
  if isinstance(value, list):
    return [v.decode() if isinstance(v, bytes) else v for v in value]
  return value


def skipped(builder, split="train"):
  """Returns {reason: names} of skipped.json."""
  report = json.loads(
    pathlib.Path(builder.data_dir, "skipped.json").read_text()
  )
  return {k: names for k, (_, names) in report[split]["skipped"].items()}


def sizes(builder):
  return {k: v.num_examples for k, v in builder.info.splits.items()}


def missing(name, tmp_path):
  """Returns the message of a build whose folder lacks its files."""
  put(tmp_path / "manual/other.txt", b"")
  with pytest.raises(UserError) as error:
    make(name, tmp_path)
  message = str(error.value)
  assert message.count("\n") == 0 and "https://" in message
  assert not list((tmp_path / "data").rglob("*.array_record*"))
  return message
