"""Real files of every kind that the web is known to hold."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.prepare import toy
from tests.data.toy import png
from vlp_jax.errors import UserError

ALL = "--max_bad=100%"


def encoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def halves(mode="RGB", size=(24, 16)):
  """A red left half and a blue right one."""
  image = Image.new("RGB", size, "red")
  image.paste("blue", (size[0] // 2, 0, *size))
  return image.convert(mode)


def one(tmp_path, name, data):
  """Prepares a folder with one picture; returns its pixels."""
  root = tmp_path / "source"
  root.mkdir()
  (root / name).write_bytes(data)
  (root / f"{os.path.splitext(name)[0]}.txt").write_text("a picture")
  folder = toy.prepare(root, tmp_path / "data")
  (record,) = toy.records(folder).values()
  return record["image"]


def rotated():
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter: shown with the left edge on top
  return encoded(halves(), "JPEG", quality=100, exif=exif)


def sixteen_bits():
  values = np.zeros((16, 24), np.uint16)
  values[:, 12:] = 65535
  return encoded(Image.fromarray(values), "PNG")


def on_white():
  image = halves("RGBA")
  image.paste((0, 0, 0, 0), (12, 0, 24, 16))
  return encoded(image, "PNG")


def animated(kind):
  frames = [Image.new("RGB", (24, 16), color) for color in ("red", "blue")]
  return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255,) * 3, (0,) * 3
READ = {  # name, bytes, height and width, colours of two corners
  "cmyk": ("x.jpg", encoded(halves("CMYK"), "JPEG"), (16, 24), RED, BLUE),
  "gray": (
    "x.jpg",
    encoded(halves("L"), "JPEG"),
    (16, 24),
    (76,) * 3,
    (29,) * 3,
  ),
  "16 bits": ("x.png", sixteen_bits(), (16, 24), BLACK, WHITE),
  "palette": ("x.png", encoded(halves("P"), "PNG"), (16, 24), RED, BLUE),
  "alpha": ("x.png", on_white(), (16, 24), RED, WHITE),
  "gif": ("x.gif", animated("GIF"), (16, 24), RED, RED),
  "webp": ("x.webp", animated("WEBP"), (16, 24), RED, RED),
  "rotated": ("x.jpg", rotated(), (24, 16), RED, BLUE),
  "extension": ("x.jpg", encoded(halves(), "PNG"), (16, 24), RED, BLUE),
  "file name": (
    "日本 é\u0301.png",
    encoded(halves(), "PNG"),
    (16, 24),
    RED,
    BLUE,
  ),
}


@pytest.mark.parametrize("kind", READ)
def test_read_as_it_should_be(kind, tmp_path):
  name, data, shape, first, last = READ[kind]
  image = one(tmp_path, name, data)
  assert image.shape == (*shape, 3)
  error = 40 if kind in ("cmyk", "webp") else 3  # lossy, with coarse colours
  np.testing.assert_allclose(image[1, 1], first, atol=error)
  np.testing.assert_allclose(image[-2, -2], last, atol=error)


def test_plain_pictures_are_kept_byte_for_byte(tmp_path):
  from vlp_jax.data import intake

  for kind in ("PNG", "JPEG"):
    data = encoded(halves(), kind)
    assert intake.picture(data) is data


def test_large_pictures_are_reduced_on_request(tmp_path):
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "a.png").write_bytes(encoded(halves(size=(120, 60)), "PNG"))
  folder = toy.prepare(root, tmp_path / "data", "--image_size=20")
  shapes = {k: r["image"].shape for k, r in toy.records(folder).items()}
  assert shapes["a.png"] == (20, 40, 3) and shapes["b.png"] == (16, 16, 3)


def test_captions_are_kept_as_they_are_but_for_blanks(tmp_path):
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "a.txt").write_text(" two\n lines\t\u3000\r\n", "utf-8-sig")
  (root / "b.txt").write_text("שלום 👩‍👩‍👧 ﬁ", encoding="utf-8")
  (root / "c.txt").write_text("שלום 👩‍👩‍👧 ﬁ", encoding="utf-8")
  folder = toy.prepare(root, tmp_path / "data")
  captions = {k: r["captions"] for k, r in toy.records(folder).items()}
  assert captions["a.png"] == ["two lines"]
  assert captions["b.png"] == captions["c.png"] == ["שלום 👩‍👩‍👧 ﬁ"]


def bomb():
  """A PNG whose header says 20,000 x 20,000 pixels."""

  def chunk(kind, data):
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc

  header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
  body = chunk(b"IDAT", zlib.compress(bytes(1000)))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
PICTURE = Image.fromarray(NOISE)
SKIPPED = {
  "truncated JPEG": (encoded(PICTURE, "JPEG")[:-900], "damaged picture"),
  "truncated PNG": (encoded(PICTURE, "PNG")[:-900], "damaged picture"),
  "empty file": (b"", "empty file"),
  "HTML": (b"\n <!DOCTYPE html><html>404</html>", "not a picture"),
  "random bytes": (NOISE.tobytes(), "not a picture"),
  "bomb": (bomb(), "picture too large"),
  "small": (png("red", (7, 90)), "picture too small"),
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_pictures_that_are_skipped(kind, tmp_path):
  data, reason = SKIPPED[kind]
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "b.jpg").write_bytes(data)
  folder = toy.prepare(root, tmp_path / "data", ALL)
  assert toy.skipped(folder) == {reason: ["b.jpg"]}
  assert set(toy.records(folder)) == {"a.png", "b.png", "c.png"}


CAPTIONS = {
  "empty": (b"", "empty caption"),
  "blank": (" \n\t\u3000 ".encode(), "empty caption"),
  "not UTF-8": ("grün".encode("latin-1"), "caption is not UTF-8"),
  "NUL": (b"a\0b", "caption holds NUL"),
  "long": (b"word " * 2001, "caption too long"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_that_are_skipped(kind, tmp_path):
  data, reason = CAPTIONS[kind]
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "b.txt").write_bytes(data)
  folder = toy.prepare(root, tmp_path / "data", ALL)
  assert toy.skipped(folder) == {reason: ["b.png"]}


ROWS = {
  "null": ('{"image": "x.png", "caption": null}', "empty caption"),
  "number": ('{"image": "x.png", "caption": 3}', "caption is not a string"),
  "object": ('{"image": "x.png", "caption": {}}', "caption is not a string"),
  "list": ('{"image": "x.png", "caption": []}', "empty caption"),
  "surrogate": (
    '{"image": "x.png", "caption": "\\ud800"}',
    "caption is not UTF-8",
  ),
  "escaped NUL": (
    '{"image": "x.png", "caption": "a\\u0000"}',
    "caption holds NUL",
  ),
  "no image": ('{"caption": "a"}', "no picture named"),
  "missing": ('{"image": "y.png", "caption": "a"}', "missing file"),
  "folder": ('{"image": "d", "caption": "a"}', "is a folder"),
  "above": (
    '{"image": "../x.png", "caption": "a"}',
    "path leaves the source folder",
  ),
  "absolute": (
    '{"image": "/etc/passwd", "caption": "a"}',
    "path leaves the source folder",
  ),
  "link": (
    '{"image": "l.png", "caption": "a"}',
    "path leaves the source folder",
  ),
  "NUL in a path": ('{"image": "a\\u0000", "caption": "a"}', "unreadable file"),
  "pipe": ('{"image": "p.png", "caption": "a"}', "unreadable file"),
  "long name": (
    '{"image": "%s.png", "caption": "a"}' % ("n" * 300),
    "unreadable file",
  ),
  "URL": (
    '{"image": "http://x.org/a.png", "caption": "a"}',
    "picture is a URL",
  ),
  "same id": (
    '{"image": "z.png", "caption": "a", "image_id": 1}',
    "duplicate id",
  ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_are_skipped(kind, tmp_path):
  line, reason = ROWS[kind]
  root = tmp_path / "source"
  (root / "d").mkdir(parents=True)
  for folder in (root, tmp_path):
    (folder / "x.png").write_bytes(png("red"))
  (root / "z.png").write_bytes(png("blue"))
  (root / "l.png").symlink_to("../x.png")
  os.mkfifo(root / "p.png")
  good = '{"image": "x.png", "caption": "good", "image_id": 1}'
  (root / "pairs.jsonl").write_text(f"{good}\n{line}\n")
  folder = toy.prepare(
    *(root / "pairs.jsonl", tmp_path / "data", ALL, "--id_column=image_id")
  )
  ((found, names),) = toy.skipped(folder).items()
  assert found == reason and names[0].startswith("pairs.jsonl:2")
  assert toy.records(folder)["1"]["captions"] == ["good"]


def test_a_line_that_is_not_utf8_is_one_rows_trouble(tmp_path):
  root = toy.jsonl(tmp_path / "source").parent
  with (root / "pairs.jsonl").open("ab") as file:
    file.write(
      '{"file_name": "images/a.png", "text": "grün"}'.encode("latin-1")
    )
  folder = toy.prepare(root / "pairs.jsonl", tmp_path / "data", ALL)
  assert list(toy.skipped(folder)) == ["caption is not UTF-8"]


def test_one_bad_caption_of_several_is_left_out(tmp_path):
  root = tmp_path
  (root / "x.png").write_bytes(png("red"))
  row = {"image": "x.png", "captions": ["one", "", "two", None, 3]}
  (root / "pairs.jsonl").write_text(json.dumps(row))
  folder = toy.prepare(root / "pairs.jsonl", tmp_path / "data")
  assert toy.records(folder)["x.png"]["captions"] == ["one", "two"]
  left_out = toy.report(folder)["captions_left_out"]
  counts = {reason: found["count"] for reason, found in left_out.items()}
  assert counts == {"empty caption": 2, "caption is not a string": 1}


def test_a_folder_of_texts(tmp_path):
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "folder.png").mkdir()
  (root / "folder.png" / "inside.png").write_bytes(png("red"))
  (root / "alone.png").write_bytes(png("red"))
  (root / "out.png").symlink_to("/etc/passwd")
  (root / ".hidden.png").write_bytes(png("red"))
  (root / "deep").mkdir()
  (root / "deep" / "d.PNG").write_bytes(png("red"))
  (root / "deep" / "d.txt").write_text("deep")
  folder = toy.prepare(root, tmp_path / "data", ALL)
  assert toy.skipped(folder) == {
    "is a folder": ["folder.png"],
    "no caption file": ["alone.png"],
    "path leaves the source folder": ["out.png"],
  }
  assert set(toy.records(folder)) == {"a.png", "b.png", "c.png", "deep/d.PNG"}


def test_tars(tmp_path):
  root = toy.tars(tmp_path / "source")
  with tarfile.open(root / "00002.tar", "w") as tar:
    for name in ("../up", "/absolute"):
      toy.add(tar, f"{name}.png", png("red"))
      toy.add(tar, f"{name}.txt", b"text")
    toy.add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    toy.add(tar, "link.txt", b"text")
    toy.add(tar, "text.txt", b"text alone")
    toy.add(tar, "bare.png", png("red"))
    toy.add(tar, "json.png", png("red"))
    toy.add(tar, "json.json", b"{")
    toy.add(tar, "a.png", png("lime"))
    toy.add(tar, "a.txt", b"another a")
  whole = (root / "00000.tar").read_bytes()
  (root / "00003.tar").write_bytes(whole[:700])
  (root / "00004.tar").write_bytes(b"<html>not a tar</html>" * 50)
  folder = toy.prepare(root, tmp_path / "data", ALL)
  found = {k: sorted(v) for k, v in toy.skipped(folder).items()}
  assert found == {
    "path leaves the source folder": [
      "00002.tar/../up",
      "00002.tar//absolute",
      "00002.tar/link",
    ],
    "no picture": ["00002.tar/text"],
    # the second tar breaks off before the caption
    "empty caption": ["00002.tar/bare", "00003.tar/a"],
    "broken JSON": ["00002.tar/json"],
    "duplicate id": ["00002.tar/a"],
    "damaged tar": ["00003.tar", "00004.tar"],
  }
  assert set(toy.records(folder)) == {"a", "b", "c"}


def test_too_many_bad_ones_stop_it_and_what_is_done_is_kept(tmp_path):
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "b.png").write_bytes(b"")
  with pytest.raises(UserError) as error:
    toy.prepare(root, tmp_path / "data")
  assert "1 of 3" in str(error.value) and "empty file: 1 (as b.png)" in str(
    error.value
  )
  assert not (tmp_path / "data" / "toy").exists()
  folder = toy.prepare(root, tmp_path / "data", "--max_bad=0.4")
  assert set(toy.records(folder)) == {"a.png", "c.png"}
  assert toy.skipped(folder) == {"empty file": ["b.png"]}
  assert [path.name for path in (tmp_path / "data").iterdir()] == ["toy"]
