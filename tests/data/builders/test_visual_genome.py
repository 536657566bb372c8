import json

import pytest

from tests.data.builders import toy
from vlp_jax.data import tfds_fields


def _region(number, phrase, x, y, width, height):
  return {
    "region_id": number,
    "image_id": 1,
    "phrase": phrase,
    **dict(x=x, y=y, width=width, height=height),
  }


@pytest.fixture
def builder(tmp_path):
  regions = [
    {
      "id": 1,
      "regions": [
        _region(10, "the clock is green", 6, 4, 6, 4),
        _region(11, "the clock is green ", 0, 0, 12, 8),
        _region(12, "a man", 12, 8, 90, 90),  # over the edge
        _region(13, "\n", 0, 0, 5, 5),
        _region(14, "nothing", 3, 3, 0, 4),
      ],
    },
    {"id": 2, "regions": [_region(20, "a road", 0, 0, 24, 16)]},
    {"id": 3, "regions": []},
  ]
  images = [
    {
      "image_id": image_id,
      "url": f"https://example.org/VG_100K_2/{image_id}.jpg",
      "width": 24,
      "height": 16,
      "coco_id": coco_id,
      "flickr_id": None,
    }
    for image_id, coco_id in ((1, None), (2, 417876), (3, None))
  ]
  manual = tmp_path / "manual"
  toy.put(manual / "region_descriptions.json", regions)
  toy.put(manual / "image_data.json", images)
  toy.put(manual / "VG_100K/1.jpg", toy.picture(1))
  toy.put(manual / "VG_100K_2/2.jpg", toy.picture(2))
  return toy.make("visual_genome", tmp_path)


def test_regions_are_captions_and_phrases(builder):
  records = {record["image_id"]: record for record in toy.read(builder)}
  assert set(records) == {1, 2}
  assert records[2]["image"] == toy.picture(2)
  assert records[2]["coco_id"] == 417876
  assert records[1]["coco_id"] == -1
  assert records[1]["captions"] == ["the clock is green", "a man"]
  assert json.loads(records[1]["phrases"]) == [
    {"text": "the clock is green", "bbox": [0.25, 0.25, 0.5, 0.5]},
    {"text": "the clock is green", "bbox": [0.0, 0.0, 0.5, 0.5]},
    {"text": "a man", "bbox": [0.5, 0.5, 1.0, 1.0]},
  ]
  assert toy.skipped(builder) == {"no usable caption": ["3.jpg"]}


def test_the_captions_are_found(builder):
  fields = tfds_fields.find(builder.info.features, "visual_genome")
  assert (fields.image, fields.caption) == ("image", "captions")
  assert fields.image_id == "image_id"


def test_missing_files_are_named(tmp_path):
  message = toy.missing("visual_genome", tmp_path)
  names = [
    "region_descriptions.json",
    "image_data.json",
    "VG_100K",
    "VG_100K_2",
  ]
  for name in names:
    assert f"missing {tmp_path}/manual/{name}, from" in message
