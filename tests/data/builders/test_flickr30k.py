from tests.data.builders import toy


def test_karpathys_split(tmp_path):
  ids = {1000092795: "train", 8253802487: "val", 1007129816: "test", 7: "test"}
  images = [
    {
      "sentids": [5 * i],
      "imgid": i,
      "sentences": [
        {"tokens": ["x"], "raw": f"Picture {i}.", "imgid": i, "sentid": 5 * i}
      ],
      "split": split,
      "filename": f"{flickr_id}.jpg",
    }
    for i, (flickr_id, split) in enumerate(ids.items())
  ]
  manual = tmp_path / "manual"
  listing = {"images": images, "dataset": "flickr30k"}
  toy.put(manual / "dataset_flickr30k.json", listing)
  for flickr_id in ids:
    path = manual / "flickr30k-images" / f"{flickr_id}.jpg"
    toy.put(path, toy.picture(0) if flickr_id > 7 else b"<html>404</html>")
  builder = toy.make("flickr30k", tmp_path)
  assert toy.sizes(builder) == {"train": 1, "validation": 1, "test": 1}
  (record,) = toy.read(builder, "validation")
  assert record.pop("image") == toy.picture(0)
  assert record == {
    "captions": ["Picture 1."],
    "image_id": 1,
    "flickr_id": 8253802487,
  }
  assert toy.skipped(builder, "test") == {"not a picture": ["7.jpg"]}


def test_missing_files_are_named(tmp_path):
  message = toy.missing("flickr30k", tmp_path)
  assert f"missing {tmp_path}/manual/dataset_flickr30k.json, from" in message
  assert f"missing {tmp_path}/manual/flickr30k-images, from" in message
