import io
import json
import pickle
import re
import shutil
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.toy import Toy, build, gray, png
from vlp_jax.data import jsonl, sources, tfds_fields
from vlp_jax.errors import UserError


def open_jsonl(config, path, split="train"):
  config.data.source = str(path)
  return sources.open_source(config.data, split)


# --- JSONL ------------------------------------------------------------------


def test_jsonl_records(config, write_jsonl):
  rows = [
    {"caption": "one", "split": "train", "label": "x", "other": 3},
    {"captions": ["two", "zwei é"], "split": "train", "keywords": ["a", "b"]},
    {"text": "three", "split": "train", "category": ["c"]},
    {"caption": "four", "split": "test"},
  ]
  source = open_jsonl(config, write_jsonl(rows))
  assert len(source) == 3 and not source.annotated
  assert [r["captions"] for r in source] == [
    ["one"],
    ["two", "zwei é"],
    ["three"],
  ]
  assert [r["image"] for r in source] == [png(gray(i)) for i in range(3)]
  assert [r["image_id"] for r in source] == [0, 1, 2]
  assert source[0]["label"] == "x" and "other" not in source[0]
  assert source[1]["keywords"] == ["a", "b"] and source[2]["category"] == ["c"]
  assert [*source.captions()] == ["one", "two", "zwei é", "three"]
  assert source.describe(1).endswith("images/1.png")
  assert source.pair(1).items() <= source[1].items()
  test = open_jsonl(config, config.data.source, "test")
  assert [r["image_id"] for r in test] == [3]  # unique across splits


def test_jsonl_null_is_no_label(config, write_jsonl):
  row = {"caption": "c", "split": "train", "label": None, "category": "cat"}
  (record,) = open_jsonl(config, write_jsonl([row]))
  assert record["category"] == "cat" and "label" not in record


def test_jsonl_folder_in_the_layout_of_imagefolder(
  config, write_jsonl, tmp_path
):
  (tmp_path / "a.png").write_bytes(png("red"))
  row = {"file_name": "a.png", "text": "a red square", "split": "train"}
  write_jsonl([row], "metadata.jsonl")
  source = open_jsonl(config, tmp_path)
  assert source[0]["captions"] == ["a red square"]
  assert source[0]["image"] == png("red")


def test_jsonl_rows_of_one_picture_are_one_record(
  config, write_jsonl, tmp_path
):
  (tmp_path / "images").mkdir()
  for name in "abc":
    (tmp_path / "images" / f"{name}.png").write_bytes(png("red"))
  names = ["b", "a", "b", "c", "a", "b"]
  rows = [
    {"image": f"images/{name}.png", "caption": f"{name}{i}", "split": "train"}
    for i, name in enumerate(names)
  ]
  source = open_jsonl(config, write_jsonl(rows))
  captions = [r["captions"] for r in source]
  assert captions == [["b0", "b2", "b5"], ["a1", "a4"], ["c3"]]
  assert [r["image_id"] for r in source] == [0, 1, 2]


def test_jsonl_image_ids(config, write_jsonl):
  def ids(values):
    rows = [{"caption": "c", "image_id": v, "split": "train"} for v in values]
    source = open_jsonl(config, write_jsonl(rows))
    assert all(isinstance(r["image_id"], int) for r in source)
    return [r["image_id"] for r in source]

  assert ids([7, 5, 2**31 - 1]) == [7, 5, 2**31 - 1]
  # Not all are integers of 31 bits: pictures are numbered.
  assert ids([7, "seven", 5]) == [0, 1, 2]
  assert ids([7, 2**31, 5]) == [0, 1, 2]
  assert ids([7, None, -1]) == [0, 1, 2]


def test_jsonl_rows_without_a_split_are_shared_out(config, write_jsonl):
  path = write_jsonl([{"caption": f"{i}"} for i in range(2000)])
  members = {
    split: {r["captions"][0] for r in open_jsonl(config, path, split)}
    for split in ("train", "validation", "test")
  }
  sizes = {k: len(v) for k, v in members.items()}
  assert sum(sizes.values()) == 2000
  assert 1750 < sizes["train"] < 1850
  assert 70 < sizes["validation"] < 130 and 70 < sizes["test"] < 130
  # By the picture's name, so that neither order nor other rows matter.
  lines = path.read_text().splitlines()
  path.write_text("\n".join(lines[:999:-1]))
  for split, captions in members.items():
    again = {r["captions"][0] for r in open_jsonl(config, path, split)}
    assert again == {c for c in captions if int(c) >= 1000}
  # And the same on every machine, for ever.
  assert sorted(members["test"], key=int)[:3] == ["2", "15", "52"]


def test_jsonl_captions_with_ids_leave_a_picture_in_one_split(
  config, write_jsonl, tmp_path
):
  write_jsonl([{"caption": "c"}] * 100)  # makes the pictures
  rows = [
    {"image": f"images/{i % 100}.png", "caption": f"{i}", "image_id": i}
    for i in range(500)
  ]
  path = write_jsonl(rows)
  lengths = [
    len(record["captions"])
    for split in ("train", "validation", "test")
    for record in open_jsonl(config, path, split)
  ]
  assert lengths == [5] * 100


def drawn(config, path):
  """Returns the splits of each caption: {caption: [split]}."""
  found = {}
  for split in jsonl.read_index(path).splits:
    for record in open_jsonl(config, path, split):
      for caption in record["captions"]:
        found.setdefault(caption, []).append(split)
  return found


@pytest.mark.parametrize("name", [int, "clip {}".format])
def test_jsonl_pictures_that_share_an_id_are_in_one_split(
  config, write_jsonl, name
):
  rows = [{"caption": f"{i}", "image_id": name(i)} for i in range(100)] * 5
  found = drawn(config, write_jsonl(rows))
  assert all(len(s) == 5 and len({*s}) == 1 for s in found.values())
  assert {s[0] for s in found.values()} == {"train", "validation", "test"}
  # Neither order nor other clips matter.
  again = drawn(config, write_jsonl(rows[::-3]))
  assert all({*splits} == {*found[c]} for c, splits in again.items())


def test_jsonl_an_id_that_joins_pictures(config, write_jsonl):
  """The later picture follows the earlier one, whatever its other ids."""
  write_jsonl([{"caption": "c"}] * 80)  # makes the pictures
  rows = []
  for i in range(40):
    first, second = f"images/{i}.png", f"images/{40 + i}.png"
    rows += [
      {"image": first, "caption": f"{i}", "image_id": i},
      {"image": first, "caption": f"{i}", "image_id": 1000 + i},
      {"image": second, "caption": f"{i}", "image_id": 1000 + i},
      {"image": second, "caption": f"{i}", "image_id": 2000 + i},
      {"image": second, "caption": f"{i}"},
    ]
  found = drawn(config, write_jsonl(rows))
  assert len({s[0] for s in found.values()}) > 1
  assert all(len({*s}) == 1 for s in found.values())


def test_jsonl_an_empty_id_is_none(config, write_jsonl):
  rows = [{"caption": f"{i}"} for i in range(200)]
  bare = drawn(config, write_jsonl(rows))
  empty = drawn(config, write_jsonl([r | {"image_id": ""} for r in rows]))
  assert bare == empty and len({s for (s,) in bare.values()}) == 3


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation"])
def test_jsonl_names_of_validation(config, write_jsonl, name):
  rows = [{"caption": "a", "split": "train"}, {"caption": "b", "split": name}]
  path = write_jsonl(rows)
  for asked in ("validation", "val", name):
    assert open_jsonl(config, path, asked)[0]["captions"] == ["b"]


def test_jsonl_odd_but_right(config, write_jsonl, tmp_path):
  (tmp_path / "a b.png").write_bytes(png("red"))
  rows = [
    '\ufeff{"image": "a b.png", "caption": "first", "split": "train"}',
    "",
    '  {"image": "images/é.png", "caption": " ", "captions": ["é"]}\r',
    json.dumps({"image": str(tmp_path / "abs.png"), "caption": "absolute"}),
  ]
  path = write_jsonl(rows)
  (tmp_path / "images" / "é.png").write_bytes(png("blue"))
  (tmp_path / "abs.png").write_bytes(png("green"))
  index = jsonl.read_index(path)
  captions = [
    c for s in index.splits for c in open_jsonl(config, path, s).captions()
  ]
  assert sorted(captions) == ["absolute", "first", "é"]


@pytest.mark.parametrize(
  "line, message",
  [
    ('{"image": "a.png", "caption": "c"', "not valid JSON"),
    ("[1, 2]", "not a JSON object"),
    ('{"caption": "c"}', 'no "image"'),
    ('{"image": 3, "caption": "c"}', 'no "image"'),
    ('{"image": "a.png"}', 'no "caption"'),
    ('{"image": "a.png", "caption": 3}', 'no "caption"'),
    ('{"image": "a.png", "captions": ["a", 3]}', 'no "caption"'),
    ('{"image": "a.png", "caption": "c", "split": 1}', '"split" is not'),
    ('{"image": "a.png", "caption": "c", "image_id": []}', '"image_id" is not'),
  ],
)
def test_jsonl_broken_line(config, write_jsonl, line, message):
  path = write_jsonl([{"caption": "fine"}, {"caption": "fine"}, line])
  expected = re.escape(f"{path}:3: ") + ".*" + re.escape(message)
  with pytest.raises(UserError, match=expected) as error:
    open_jsonl(config, path)
  assert "\n" not in str(error.value)


def test_jsonl_line_that_is_not_utf8(config, write_jsonl):
  path = write_jsonl([{"caption": "fine"}])
  path.write_bytes(path.read_bytes() + b'{"image": "\xff.png"}\n')
  with pytest.raises(UserError, match=r"pairs.jsonl:2: not valid JSON .*utf-8"):
    open_jsonl(config, path)


def test_jsonl_missing_pictures_are_named(config, write_jsonl, capsys):
  rows = [{"caption": "there", "split": "train"}]
  rows += [
    {"image": f"images/none{i}.png", "caption": "c", "split": "train"}
    for i in range(12)
  ]
  rows += [{"caption": " ", "image": "images/0.png", "split": "train"}]
  source = open_jsonl(config, write_jsonl(rows))
  assert len(source) == 1
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == 2
  assert "skipped 12 rows whose picture does not exist" in warnings[0]
  named = re.findall(r"none\d+.png", warnings[0])
  assert named == [f"none{i}.png" for i in range(10)]
  assert "skipped 1 rows without a caption: images/0.png" in warnings[1]
  open_jsonl(config, config.data.source)
  assert not capsys.readouterr().err  # said once


def test_jsonl_captions_are_as_intake_wants_them(
  config, write_jsonl, tmp_path, capsys
):
  (tmp_path / "images").mkdir()
  for name in ("a", "b", "c"):
    (tmp_path / "images" / f"{name}.png").write_bytes(png("red"))
  rows = [
    ["a", [" two\n words ", "", "nul \0", "x" * 10_001]],
    ["b", ["a lone surrogate \ud800", "fine"]],
    ["c", ["\0"]],
  ]
  path = write_jsonl(
    [
      {"image": f"images/{name}.png", "captions": captions, "split": "train"}
      for name, captions in rows
    ]
    + ['{"image": "images/b.png", "caption": "BYTES", "split": "train"}']
  )
  path.write_bytes(path.read_bytes().replace(b"BYTES", b"latin \xe9"))
  source = open_jsonl(config, path)
  assert [r["captions"] for r in source] == [["two words"], ["fine"]]
  assert [*source.captions()] == ["two words", "fine"]
  assert capsys.readouterr().err.splitlines() == [
    f"warning: {path}: skipped {what}"
    for what in (
      "2 captions (caption holds NUL): images/a.png, images/c.png",
      "1 captions (caption too long): images/a.png",
      "2 captions (caption is not UTF-8): images/b.png, images/b.png",
    )
  ]


def test_jsonl_paths_stay_inside_the_folder(
  config, write_jsonl, tmp_path, capsys, monkeypatch
):
  inside = tmp_path / "inside"
  (inside / "images").mkdir(parents=True)
  picture = inside / "images" / "a.png"
  picture.write_bytes(png("red"))
  (inside / "..b.png").write_bytes(png("blue"))
  (tmp_path / "outside.png").write_bytes(png("red"))
  (inside / "link.png").symlink_to(tmp_path / "outside.png")
  names = ["../outside.png", str(tmp_path / "outside.png"), "x/../../y.png"]
  names += ["images/../images/a.png", str(picture), "link.png", "..b.png"]
  names += ["images"]
  rows = [{"image": n, "caption": n, "split": "train"} for n in names]
  path = write_jsonl(rows, "inside/pairs.jsonl")
  source = open_jsonl(config, path)
  assert [*source.captions()] == names[3:7]
  warnings = capsys.readouterr().err.splitlines()
  assert (
    f"3 rows whose picture is not inside the folder: {names[0]}, "
    in (warnings[0])
  )
  assert warnings[1].endswith("1 rows whose picture does not exist: images")
  # However the folder is called.
  link = tmp_path / "another"
  link.symlink_to(inside)
  monkeypatch.chdir(inside / "images")
  for way in (link / "pairs.jsonl", "../pairs.jsonl"):
    assert [*open_jsonl(config, way).captions()] == names[3:7]


def test_jsonl_of_nothing_but_refused_rows(config, write_jsonl):
  rows = [{"image": "../a.png", "caption": "c"}, {"caption": "\0"}]
  says = (
    r"none of its rows can be used; skipped 1 rows whose picture is not inside "
    r"the folder: ../a.png; 1 captions \(caption holds NUL\): images/1.png"
  )
  with pytest.raises(UserError, match=says):
    open_jsonl(config, write_jsonl(rows))


def test_jsonl_line_that_is_too_deep(config, write_jsonl):
  path = write_jsonl([{"caption": "fine"}, "[" * 100_000])
  with pytest.raises(UserError, match=r"pairs.jsonl:2: not valid JSON"):
    open_jsonl(config, path)


def test_jsonl_nothing_left(config, write_jsonl):
  rows = [{"image": f"none{i}.png", "caption": "c"} for i in range(3)]
  with pytest.raises(UserError, match=r"none of its 3 pictures exists .none0"):
    open_jsonl(config, write_jsonl(rows))
  with pytest.raises(UserError, match=r"none of its 2 rows has a caption"):
    open_jsonl(config, write_jsonl([{"caption": ""}, {"captions": []}]))
  with pytest.raises(UserError, match=r"pairs.jsonl is empty"):
    open_jsonl(config, write_jsonl([""]))


def test_jsonl_missing_split(config, write_jsonl):
  rows = [
    {"caption": "a", "split": "train"},
    {"caption": "b", "split": "extra"},
  ]
  expected = r"no rows of split 'test' \(train: 1, extra: 1\); .*test}_split"
  with pytest.raises(UserError, match=expected):
    open_jsonl(config, write_jsonl(rows), "test")


def test_jsonl_missing_file(config, tmp_path):
  with pytest.raises(UserError, match=r"no file .*none.jsonl; it takes FILE"):
    open_jsonl(config, tmp_path / "none.jsonl")
  with pytest.raises(UserError, match=r"no file .*metadata.jsonl; it takes"):
    open_jsonl(config, tmp_path)
  (tmp_path / "pairs.csv").write_text("image,caption\n")
  with pytest.raises(UserError, match=r"not a .jsonl file; .*data.prepare"):
    open_jsonl(config, tmp_path / "pairs.csv")


def test_jsonl_fingerprint_tells_changes(config, write_jsonl):
  rows = [{"caption": "a", "split": "train"}, {"caption": "b", "split": "test"}]
  path = write_jsonl(rows)
  first = open_jsonl(config, path).fingerprint
  assert first.startswith("pairs.jsonl:train:1 records:sha256 ")
  assert open_jsonl(config, path, "test").fingerprint != first
  write_jsonl([{**rows[0], "caption": "A"}, rows[1]])
  assert open_jsonl(config, path).fingerprint != first
  write_jsonl(rows)
  assert open_jsonl(config, path).fingerprint == first


def test_jsonl_that_changes_in_use(config, write_jsonl):
  source = open_jsonl(config, write_jsonl([{"caption": "a", "split": "train"}]))
  write_jsonl(["x" * 200])
  with pytest.raises(UserError, match="changed while it was in use"):
    source[0]


def test_jsonl_keeps_only_offsets_in_memory(config, write_jsonl):
  rows = [{"caption": "first", "split": "train"}]
  rows += [
    {"image": "images/0.png", "caption": "x" * 500, "split": "train"}
    for _ in range(5000)
  ]
  source = open_jsonl(config, write_jsonl(rows))
  assert len(source) == 1 and len(source[0]["captions"]) == 5001
  assert len(pickle.dumps(source)) < 5001 * 24 + 5000  # not 2.5 MB


def test_jsonl_source_is_picklable(config, write_jsonl):
  source = open_jsonl(config, write_jsonl([{"caption": "a", "split": "train"}]))
  record = source[0]
  copy = pickle.loads(pickle.dumps(source))
  assert copy[0] == record and copy.fingerprint == source.fingerprint


# --- TFDS -------------------------------------------------------------------


def test_tfds_records(config, toy_tfds):
  config.data.name = "toy"
  source = sources.open_source(config.data, "train")
  assert len(source) == 20 and not source.annotated
  assert source.name == "toy/1.0.0:train"
  for i in range(20):
    record = source[i]
    assert record["image"] == png(gray(i))
    assert record["captions"] == [f"a naïve picture {i}", f"number {i}"]
    assert record["image_id"] == i and record["label"] == i % 2
  validation = sources.open_source(config.data, "validation")
  assert [r["image_id"] for r in validation] == list(range(20, 26))
  assert source.fingerprint != validation.fingerprint
  assert "toy/1.0.0:train:20 records" in source.fingerprint
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["toy:1.0.0", "{dir}/toy/1.0.0"])
def test_tfds_names(config, toy_tfds, name):
  config.data.name = name.format(dir=toy_tfds)
  assert len(sources.open_source(config.data, "train")) == 20


def test_tfds_parts_of_splits(config, toy_tfds):
  config.data.name = "toy"
  part = sources.open_source(config.data, "train[75%:]")
  captions = [r["captions"][1] for r in part]
  assert captions == [f"number {i}" for i in range(15, 20)]


def test_tfds_source_is_picklable(config, toy_tfds):
  config.data.name = "toy"
  source = sources.open_source(config.data, "train")
  record = source[3]
  data = pickle.dumps(source)
  assert len(data) < 2000
  copy = pickle.loads(data)
  assert copy[3] == record and copy.fingerprint == source.fingerprint


def test_tfds_missing(config, toy_tfds):
  for name in ("none", "toy:3.0.0", "toy/large", "a b", ""):
    config.data.name = name
    with pytest.raises(UserError) as error:
      sources.open_source(config.data, "train")
    message = str(error.value)
    assert message.startswith(f"no data set {name!r} in {toy_tfds};")
    assert "data.prepare" in message and "\n" not in message


def test_tfds_missing_split(config, toy_tfds):
  config.data.name = "toy"
  expected = r"no split 'test' \(train: 20, validation: 6\); .* train\[90%:\]"
  with pytest.raises(UserError, match=expected):
    sources.open_source(config.data, "test")


def test_tfds_without_random_access(config, toy_tfds, tmp_path, monkeypatch):
  shutil.copytree(toy_tfds / "toy", tmp_path / "toy")
  info = tmp_path / "toy" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config.data.name = "toy"
  with pytest.raises(UserError, match=r"stored as tfrecord, .*array_record"):
    sources.open_source(config.data, "train")


class Titled(Toy):
  """Has texts that may or may not be captions, and an id."""

  name = "titled"
  counts = {"train": 4}  # noqa: RUF012

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "left": tfds.features.Image(),
          "right": tfds.features.Image(),
          "en": tfds.features.Text(),
          "de": tfds.features.Sequence(np.str_),
          "image_id": np.int64,
        }
      ),
      disable_shuffling=True,
    )

  def _generate_examples(self, count):
    for i in range(count):
      sides = {"left": png("red"), "right": png("blue")}
      pictures = {k: io.BytesIO(v) for k, v in sides.items()}
      texts = {"en": f"en {i}", "de": [f"de {i}", ""]}
      yield i, {**pictures, **texts, "image_id": 100 + i}


@pytest.fixture
def titled(config, tmp_path, monkeypatch):
  build(Titled, tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config.data.name = "titled"
  return config


def test_tfds_ambiguous_features(titled):
  with pytest.raises(UserError) as error:
    sources.open_source(titled.data, "train")
  message = str(error.value)
  assert "several Text features" in message
  assert "--config.data.caption_key" in message and "\n" not in message
  for feature in (
    "left: Image",
    "right: Image",
    "en: Text",
    "image_id: Tensor",
  ):
    assert feature in message
  assert "de: Sequence(Text)" in message
  titled.data.caption_key = "en"
  with pytest.raises(
    UserError, match=r"several Image .*--config.data.image_key"
  ):
    sources.open_source(titled.data, "train")


def test_tfds_chosen_features(titled):
  titled.data.image_key, titled.data.caption_key = "right", "de"
  source = sources.open_source(titled.data, "train")
  assert source[2] == {
    "image": png("blue"),
    "captions": ["de 2", ""],
    "image_id": 102,
  }
  titled.data.caption_key = "fr"
  with pytest.raises(
    UserError, match=r"caption_key=fr: titled/1.0.0 has no su"
  ):
    sources.open_source(titled.data, "train")
  titled.data.caption_key = "left"
  with pytest.raises(UserError, match=r"caption_key=left: .* Text feature"):
    sources.open_source(titled.data, "train")


def test_find_features():
  text, image = tfds.features.Text(), tfds.features.Image()

  def find(**features):
    return tfds_fields.find(tfds.features.FeaturesDict(features), "d")

  # As coco_captions has them.
  fields = find(
    image=image,
    captions=tfds.features.Sequence({"id": np.int64, "text": np.str_}),
    objects=tfds.features.Sequence(
      {"label": tfds.features.ClassLabel(num_classes=3), "is_crowd": np.bool_}
    ),
    **{"image/filename": text, "image/id": np.int64},
  )
  assert fields == tfds_fields.Fields("image", "captions/text", "image/id")
  assert find(a=image, b=text) == tfds_fields.Fields("a", "b")
  assert find(image=image, url=text, description=text).caption == "description"
  assert find(i={"x": image}, t={"text": {"y": text}}).image == "i/x"
  with pytest.raises(
    UserError, match=r"no Image features .* video: Sequence\(Im"
  ):
    find(video=tfds.features.Sequence(image), text=text)
  with pytest.raises(UserError, match=r"no Text features .*caption_key; its"):
    find(image=image, label=tfds.features.ClassLabel(num_classes=2))


def test_annotated_records(toy_dir, monkeypatch):
  module = types.ModuleType("annotating")
  module.to_record = lambda example: {"objects": [int(example["label"])]}
  monkeypatch.setitem(sys.modules, "annotating", module)
  builder = tfds.builder_from_directory(toy_dir / "toy" / "1.0.0")
  source = sources.TfdsSource(builder, "train", to_record="annotating")
  assert source[3] == {"objects": [1]}
  assert source.pair(3)["captions"][1] == "number 3"
  copy = pickle.loads(pickle.dumps(source))
  assert copy[3] == {"objects": [1]}


@pytest.mark.parametrize("damage", [b"\xff", RuntimeError("bad\nchunk")])
def test_damaged_records_are_named(toy_dir, monkeypatch, damage):
  class Raw:
    def __getitem__(self, index):
      if isinstance(damage, Exception):
        raise damage
      return damage

  builder = tfds.builder_from_directory(toy_dir / "toy" / "1.0.0")
  for to_record in ("", "annotating"):
    source = sources.TfdsSource(builder, "train", to_record=to_record)
    monkeypatch.setitem(source.__dict__, "_raw", Raw())
    for read in (source.pair, source.__getitem__):
      with pytest.raises(sources.UnreadableRecord) as error:
        read(3)
      message = str(error.value)
      assert message.startswith("toy/1.0.0:train[3]: record cannot be read (")
      assert "\n" not in message
      assert str(pickle.loads(pickle.dumps(error.value))) == message


@pytest.mark.parametrize("name", ["scenes", "scenes/px64", "scenes:1.0.0"])
def test_scenes_is_made_at_first_use(config, toy_tfds, monkeypatch, name):
  from vlp_jax.data.builders import scenes

  asked = []

  def ensure_built(name, data_dir):
    asked.append((name, data_dir))
    return tfds.builder_from_directory(toy_tfds / "toy" / "1.0.0")

  monkeypatch.setattr(scenes, "ensure_built", ensure_built)
  config.data.name = name
  assert len(sources.open_source(config.data, "train")) == 20
  assert asked == [(name, toy_tfds)]
