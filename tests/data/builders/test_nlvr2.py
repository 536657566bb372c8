import pytest

from tests.data.builders import toy


def _line(identifier, label="True", **more):
  return {
    "validation": {"61": "False"},
    "sentence": f"Sentence of {identifier}.",
    "left_url": "https://example.org/a.jpg",
    "writer": "61",
    "label": label,
    "right_url": "https://example.org/b.jpg",
    "synset": "beer bottle",
    "query": "some beer bottles38",
    "identifier": identifier,
    **more,
  }


def _pair(folder, stem):
  for k in (0, 1):  # not all of them are PNG, whatever their names say
    toy.put(folder / f"{stem}-img{k}.png", toy.picture(k, ("PNG", "JPEG")[k]))


@pytest.fixture
def manual(tmp_path):
  folder = tmp_path / "manual"
  lists = {
    "train": [
      _line("train-10171-0-0", directory=43),
      _line("train-10171-0-1", "False", directory=43),
      _line("train-1-1-0", directory=7),  # without pictures
      b"{broken",
    ],
    "dev": [_line("dev-850-0-0")],
    "test1": [_line("test1-0-1-0")],
    "test2": [_line("test2-189-0-0")],
  }
  for name, rows in lists.items():
    toy.put_lines(folder / f"nlvr2/data/{name}.json", rows)
  _pair(folder / "images/train/43", "train-10171-0")
  _pair(folder / "dev", "dev-850-0")
  _pair(folder / "test1", "test1-0-1")
  return folder


def test_pairs(manual, tmp_path):
  builder = toy.make("nlvr2", tmp_path)
  assert toy.sizes(builder) == {"train": 2, "validation": 1, "test": 1}
  records = sorted(toy.read(builder), key=lambda r: r["identifier"])
  assert [r["label"] for r in records] == [1, 0]
  assert records[0]["image_left"] == toy.picture(0, "PNG")
  assert records[0]["image_right"] == toy.picture(1, "JPEG")
  assert records[0]["sentence"] == "Sentence of train-10171-0-0."
  assert toy.skipped(builder) == {
    "missing file": ["train.json:3"],
    "malformed entry": ["train.json:4"],
  }


def test_the_former_hidden_test_set(manual, tmp_path):
  _pair(manual / "test2", "test2-189-0")
  assert toy.sizes(toy.make("nlvr2", tmp_path))["test2"] == 1


def test_missing_files_are_named(tmp_path):
  message = toy.missing("nlvr2", tmp_path)
  manual = tmp_path / "manual"
  assert f"missing {manual}/dev.json (or nlvr2/data/dev.json), from" in message
  assert f"missing {manual}/images/train, from" in message
