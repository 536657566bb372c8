from tests.data.builders import toy


def _line(flickr_id, gold_label, number):
  return {
    "Flickr30K_ID": flickr_id,
    "annotator_labels": [gold_label],
    "captionID": f"{flickr_id}.jpg#0",
    "gold_label": gold_label,
    "pairID": f"{flickr_id}.jpg#0r{number}{gold_label[0]}",
    "sentence1": "A premise.",
    "sentence2": "A hypothesis.",
  }


def test_sentences(tmp_path):
  manual = tmp_path / "manual"
  labels = ("contradiction", "neutral", "entailment", "-")
  rows = [_line("4705552913", label, i) for i, label in enumerate(labels)]
  toy.put_lines(manual / "snli_ve_train.jsonl", rows)
  missing = _line("8", "neutral", 0)
  toy.put_lines(manual / "snli_ve_dev.jsonl", [rows[0], missing, {"a": 1}])
  toy.put_lines(manual / "snli_ve_test.jsonl", rows[:1])
  toy.put(manual / "flickr30k-images/4705552913.jpg", toy.picture())
  builder = toy.make("snli_ve", tmp_path)
  assert toy.sizes(builder) == {"train": 3, "validation": 1, "test": 1}
  records = sorted(toy.read(builder), key=lambda r: r["label"])
  assert [record["label"] for record in records] == [0, 1, 2]
  assert records[2] == {
    "image": toy.picture(),
    "sentence": "A hypothesis.",
    "label": 2,
    "flickr_id": 4705552913,
    "pair_id": "4705552913.jpg#0r2e",
  }
  assert builder.info.features["label"].names == list(labels[:3])
  assert toy.skipped(builder) == {"no label": ["snli_ve_train.jsonl:4"]}
  assert toy.skipped(builder, "validation") == {
    "missing file": ["snli_ve_dev.jsonl:2"],
    "no 'gold_label'": ["snli_ve_dev.jsonl:3"],
  }


def test_missing_files_are_named(tmp_path):
  message = toy.missing("snli_ve", tmp_path)
  assert f"missing {tmp_path}/manual/snli_ve_dev.jsonl, from" in message
  assert f"missing {tmp_path}/manual/flickr30k-images, from" in message
