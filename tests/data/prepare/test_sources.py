import json
import tarfile

import numpy as np
import pytest
from PIL import ImageColor

from tests.data.prepare import toy
from tests.data.toy import png
from vlp_jax import config as config_lib
from vlp_jax.data import sources
from vlp_jax.errors import UserError


@pytest.mark.parametrize("kind", toy.KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_source_makes_the_same_records(kind, tmp_path):
  folder = toy.prepare(kind(tmp_path / "source"), tmp_path / "data")
  records = toy.records(folder)
  found = {r["captions"][0]: r["image"] for r in records.values()}
  assert found.keys() == set(toy.CAPTIONS.values())
  for key, color in toy.COLORS.items():
    image = found[toy.CAPTIONS[key]]
    assert image.shape == (16, 16, 3)
    np.testing.assert_array_equal(image[0, 0], ImageColor.getrgb(color))
  report = toy.report(folder)
  assert (report["read"], report["written"], report["skipped"]) == (3, 3, {})


def test_commands_read_what_was_prepared(tmp_path, monkeypatch):
  toy.prepare(toy.jsonl(tmp_path / "source"), tmp_path / "data")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  data = config_lib.default_config().data
  data.name = "toy"
  source = sources.open_source(data, "train")
  assert sorted(source.captions()) == sorted(toy.CAPTIONS.values())
  assert source[0]["image"] in [png(color) for color in toy.COLORS.values()]


@pytest.mark.parametrize("labels", [("cat", "dog"), (0, 1)])
def test_records_without_a_label_have_none(labels, tmp_path, monkeypatch):
  path = toy.jsonl(tmp_path / "source")
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row, label in zip(rows, (*labels, None), strict=True):
    row |= {"label": label, "category": "c"}
  path.write_text("\n".join(map(json.dumps, rows)))
  toy.prepare(path, tmp_path / "data", "--keep=label,category")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  data = config_lib.default_config().data
  data.name = "toy"
  found = {r["captions"][0]: r for r in sources.open_source(data, "train")}
  a, b, c = (found[caption] for caption in toy.CAPTIONS.values())
  assert (a["label"], b["label"]) == labels
  assert "label" not in c and c["category"] == "c"


def test_a_list_with_a_name_of_its_own_in_a_folder_is_pointed_at(tmp_path):
  path = toy.jsonl(tmp_path / "source", "pairs.jsonl")
  with pytest.raises(UserError, match=f"give --source={path}$"):
    toy.prepare(path.parent, tmp_path / "data", "--max_bad=100%")


def test_given_columns_and_fields_that_are_kept(tmp_path):
  (tmp_path / "x.png").write_bytes(png("red"))
  (tmp_path / "y.png").write_bytes(png("red"))
  rows = [
    {"pic": "x.png", "alt": ["one", " one ", "two"], "nr": 7, "n": 1, "f": 1}
    | {"tags": ["p", "q"], "box": {"w": 2}, "s": "word", "image": 3},
    {"pic": "y.png", "alt": "three", "nr": 8, "f": 0.5, "box": [1], "image": 4},
  ]
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  folder = toy.prepare(
    path,
    tmp_path / "data",
    "--image_column=pic",
    "--caption_column=alt",
    "--id_column=nr",
    "--keep=n,f,tags,box,s",
  )
  records = toy.records(folder)
  assert records["7"]["captions"] == ["one", "two"]
  kept = {k: records["7"][k] for k in ("n", "f", "tags", "box", "s")}
  assert kept["n"] == 1 and kept["f"] == 1.0 and kept["s"] == b"word"
  assert list(kept["tags"]) == [b"p", b"q"]
  assert json.loads(kept["box"]) == {"w": 2}
  lacking = records["8"]
  assert lacking["n"] == -1 and lacking["s"] == b"" and not len(lacking["tags"])


def test_rows_of_one_picture_are_one_record(tmp_path):
  (tmp_path / "x.png").write_bytes(png("red"))
  (tmp_path / "y.png").write_bytes(png("lime"))
  path = tmp_path / "pairs.csv"
  path.write_text("filepath,title\nx.png,one\ny.png,two\nx.png,three\n")
  folder = toy.prepare(path, tmp_path / "data")
  records = toy.records(folder)
  assert records["x.png"]["captions"] == ["one", "three"]
  report = toy.report(folder)
  assert (report["read"], report["written"], report["merged"]) == (3, 2, 1)


@pytest.mark.parametrize("name", ["id", "key", "image_id"])
def test_rows_of_one_picture_with_ids_of_their_own(name, tmp_path):
  rows = [
    {name: number, "image": f"{number % 40}.png", "caption": f"c {number}"}
    for number in range(200)
  ]
  for number in range(40):
    (tmp_path / f"{number}.png").write_bytes(png((number, 0, 0)))
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  folder = toy.prepare(path, tmp_path / "data", split="train:0.5,test:0.5")
  train, test = (toy.records(folder, split) for split in ("train", "test"))
  assert train and test and not set(train) & set(test)
  assert {*train, *test} == {f"{number}.png" for number in range(40)}
  assert all(len(r["captions"]) == 5 for r in {**train, **test}.values())


def two_folders(root, make):
  """The three pictures in `a`, and others of the same names in `b`."""
  root.mkdir()
  make(root / "a")
  make(root / "b")


@pytest.mark.parametrize(
  ("make", "below", "names"),
  [
    (toy.metadata_jsonl, "*", "images/{}.png"),
    (toy.metadata_csv, "*/metadata.csv", "images/{}.png"),
    (toy.folder_of_texts, "*", "{}.png"),
    (toy.tars, "*/*.tar", "{}"),
    (toy.compressed_tar, "*/all.tar.gz", "{}"),
  ],
)
def test_parts_in_folders_of_their_own(make, below, names, tmp_path):
  two_folders(tmp_path / "s", make)
  folder = toy.prepare(tmp_path / "s" / below, tmp_path / "data")
  assert toy.records(folder).keys() == {
    f"{part}/{names.format(key)}" for part in "ab" for key in toy.COLORS
  }
  assert not toy.skipped(folder)


def test_parquet_files_of_the_same_name_in_folders_of_their_own(tmp_path):
  two_folders(tmp_path / "s", toy.parquet_bytes)
  folder = toy.prepare(tmp_path / "s" / "*", tmp_path / "data")
  assert len(toy.records(folder)) == 6 and not toy.skipped(folder)


def test_a_list_beside_a_folder_with_one_of_its_own(tmp_path):
  two_folders(tmp_path / "s", toy.metadata_jsonl)
  a, b = tmp_path / "s" / "a", tmp_path / "s" / "a" / "below"
  (tmp_path / "s" / "b").rename(b)
  folder = toy.prepare(f"train={a},train={b}", tmp_path / "data", split="")
  images = {f"images/{key}.png" for key in toy.COLORS}
  found = toy.records(folder).keys()
  assert found == images | {f"below/{name}" for name in images}


def test_ids_of_a_column_are_as_they_stand_in_several_folders(tmp_path):
  for part in "ab":
    path = toy.jsonl(tmp_path / part)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"nr": part + row["file_name"][7]} for row in rows]
    path.write_text("\n".join(map(json.dumps, rows)))
  folder = toy.prepare(
    tmp_path / "?" / "pairs.jsonl", tmp_path / "data", "--id_column=nr"
  )
  assert toy.records(folder).keys() == {"aa", "ab", "ac", "ba", "bb", "bc"}


def test_a_csv_cell_may_hold_a_list(tmp_path):
  (tmp_path / "x.png").write_bytes(png("red"))
  path = tmp_path / "pairs.csv"
  path.write_text('image,captions\nx.png,"[""one"", ""two""]"\n')
  records = toy.records(toy.prepare(path, tmp_path / "data"))
  assert records["x.png"]["captions"] == ["one", "two"]


def test_splits_from_a_field(tmp_path):
  path = toy.jsonl(tmp_path / "s")
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row, split in zip(rows, ("train", "val", "test"), strict=True):
    row["part"] = split
  path.write_text("\n".join(map(json.dumps, rows)))
  folder = toy.prepare(path, tmp_path / "data", "--splits=part", split="")
  names = {split: list(toy.records(folder, split)) for split in _SPLITS}
  assert names == {
    s: [f"images/{k}.png"] for s, k in zip(_SPLITS, "abc", strict=True)
  }


_SPLITS = ("train", "validation", "test")


def test_splits_from_separate_sources(tmp_path):
  a, b = toy.tars(tmp_path / "a"), toy.folder_of_texts(tmp_path / "b")
  folder = toy.prepare(f"train={a},val={b}", tmp_path / "data", split="")
  assert set(toy.records(folder, "train")) == {"a", "b", "c"}
  assert set(toy.records(folder, "validation")) == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize("split", ["2014/train", "train set", "v1.0"])
def test_splits_that_tfds_could_not_read(split, tmp_path):
  path = toy.jsonl(tmp_path / "s")
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[1]["split"] = split
  path.write_text("\n".join(map(json.dumps, rows)))
  message = f"{path}:2 images/b.png: split {split!r}: a split's name is made of"
  with pytest.raises(UserError, match=message):
    toy.prepare(path, tmp_path / "data", split="")
  with tarfile.open(tmp_path / "t.tar", "w") as tar:
    toy.add(tar, "a.png", png("red"))
    toy.add(
      tar, "a.json", json.dumps({"caption": "a", "split": split}).encode()
    )
  with pytest.raises(UserError, match=f"t.tar/a: split {split!r}: "):
    toy.prepare(tmp_path / "t.tar", tmp_path / "data", split="")
  with pytest.raises(UserError, match=f"--splits: split {split!r}: "):
    toy.prepare(path, tmp_path / "data", split=f"{split}:1")


def test_drawn_splits_stay_when_rows_are_added(tmp_path):
  picture = png("red")

  def make(name, numbers):
    root = tmp_path / name
    root.mkdir()
    for i in numbers:
      (root / f"{i}.png").write_bytes(picture)
      (root / f"{i}.txt").write_text("red")
    return toy.prepare(
      root, tmp_path / f"{name}_data", split="train:0.6,test:0.4"
    )

  few, many = make("few", range(0, 60, 2)), make("many", range(60))
  for split, share in (("train", 0.6), ("test", 0.4)):
    small, large = set(toy.records(few, split)), set(toy.records(many, split))
    assert small < large
    assert abs(len(large) - 60 * share) < 12


@pytest.mark.parametrize(
  ("source", "hint"),
  [
    ("", "--source=PATH is missing"),
    ("nowhere", "no such file or folder"),
    ("no*.tar", "no such file or folder"),
    ("x/{00..03}.tar", "3 of 4 files do not exist, the first of them x/01.tar"),
    ("x/notes.doc", "not a list or tar"),
    ("empty", "is empty"),
    ("x/empty.jsonl", "no column for the image"),
    ("x/broken.jsonl", "broken.jsonl:2: not valid JSON"),
    ("x/number.jsonl", "number.jsonl:1: not a JSON object"),
    ("x/columns.csv", "no column for the caption; its columns are image, size"),
    ("x/ragged.csv", "ragged.csv:3: 3 cells"),
    ("x/urls.csv", "img2dataset --url_list="),
    ("x/false.parquet", "not a Parquet file"),
  ],
)
def test_what_stops_at_once(source, hint, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  root = tmp_path / "x"
  root.mkdir()
  toy.write_tar(root / "00.tar", "a")
  (root / "notes.doc").write_text("-")
  (root / "empty.jsonl").write_text("")
  good = '{"image": "a.png", "caption": "a"}\n'
  (root / "broken.jsonl").write_text(good + '{"image": "b.png", "capt')
  (root / "number.jsonl").write_text("3\n")
  (root / "columns.csv").write_text("image,size\na.png,3\n")
  (root / "ragged.csv").write_text("image,text\na.png,a\nb.png,b, or c\n")
  (root / "urls.csv").write_text("url,TEXT\nhttps://x.org/a.jpg,a\n")
  (root / "false.parquet").write_bytes(b"PAR1 and no more")
  with pytest.raises(UserError) as error:
    toy.prepare(source, tmp_path / "data")
  assert hint in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "data" / "toy" / "1.0.0").exists()


@pytest.mark.parametrize(
  ("flag", "hint"),
  [
    ("--name=My-Data", "small letters"),
    ("--name=scenes", "embedded"),
    ("--splits=train:0.9,test:0.2", "add up to 1"),
    ("--splits=part", "no column 'part'; its columns are file_name, text"),
    ("--keep=part", "no column 'part'"),
    ("--keep=captions", "have a field of this name"),
    ("--image_column=x", "no column 'x'"),
    ("--max_bad=lots", "a share"),
    ("--min_side=0", "at least 1"),
    ("--image_size=-1", "negative"),
    ("--sauce=x", "--source"),
    ("--config.seed=1", "no --config"),
  ],
)
def test_unfit_flags(flag, hint, tmp_path):
  source = toy.jsonl(tmp_path / "source")
  with pytest.raises(UserError, match=hint.replace("(", r"\(")):
    toy.prepare(source, tmp_path / "data", flag, split="")
