import io
import json
import tarfile

import pytest

from tests.data.builders import toy
from vlp_jax.data import tfds_fields


def _shard(path, samples):
  """Writes a shard as img2dataset does: 000000001.jpg, .txt, .json."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for key, image, caption in samples:
      about = {
        "url": f"http://example.org/{key}.jpg",
        "caption": caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 24,
        "height": 16,
        "exif": "{}",
        "sha256": "0" * 64,
      }
      texts = {"txt": caption.encode(), "json": json.dumps(about).encode()}
      for suffix, data in {"jpg": image, **texts}.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("name", ["cc3m", "cc12m", "sbu"])
def test_shards(name, tmp_path):
  folder = tmp_path / "manual" / name
  first = [(f"{i:09d}", toy.picture(i), f"picture {i}") for i in range(3)]
  _shard(folder / "00000.tar", [*first, ("000000003", toy.picture(), " ")])
  _shard(folder / "00001.tar", [("000010000", b"gone", "a dog")])
  with (folder / "00002.tar").open("wb") as file:  # breaks off
    file.write((folder / "00000.tar").read_bytes()[:6000])
  builder = toy.make(name, tmp_path)
  records = {r["url"]: r for r in toy.read(builder)}
  record = records["http://example.org/000000002.jpg"]
  assert record["image"] == toy.picture(2)
  assert record["captions"] == ["picture 2"] and record["image_id"] == 2
  reasons = toy.skipped(builder)
  assert reasons["empty caption"] == ["00000.tar/000000003"]
  assert reasons["not a picture"] == ["00001.tar/000010000"]
  assert reasons["damaged tar"] == ["00002.tar"]
  fields = tfds_fields.find(builder.info.features, name)
  assert fields.caption == "captions"


def test_missing_shards_are_named(tmp_path):
  message = toy.missing("cc3m", tmp_path)
  assert f"missing {tmp_path}/manual/cc3m/*.tar" in message
  assert "img2dataset --url_list=cc3m.tsv" in message
