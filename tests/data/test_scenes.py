"""The data set `scenes`: the same everywhere, true, and safely built."""

import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlp_jax.data import generation
from vlp_jax.data import scenes_generate as generate
from vlp_jax.data import scenes_language as language
from vlp_jax.data import scenes_render as render
from vlp_jax.data.builders import scenes
from vlp_jax.data.dice import Dice
from vlp_jax.errors import UserError

_ROOT = pathlib.Path(__file__).parents[2]

# Golden values. If one changes, so must `Scenes.VERSION`.
DICE_BELOW = [448, 430, 419, 277]
DICE_BYTES = [178, 108, 185, 207, 92]
EXAMPLES = {
  "debug": "e6417a41d825b226",
  "objects5": "328fd4cdd68428cf",
  "px128": "d7d411fa9955d81e",
  "px64": "e6417a41d825b226",
  "px96": "92779cd091b44be2",
}
PICTURES = {
  "debug": "32a169e9aa5690e4",
  "objects5": "64eb8eeae6180b6c",
  "px128": "2f7c3651f99169d0",
  "px64": "32a169e9aa5690e4",
  "px96": "4f44c08387405c89",
}
SPLITS = {
  "comp": "8c68eced2d9ef3ea",
  "test": "8f13d7a96253dac2",
  "train": "bd45f8a17d79ed06",
  "validation": "361835b868f636fc",
}


def _digest(examples) -> str:
  """Hashes all of some examples: the PNG bytes, the texts and the boxes."""
  digest = hashlib.sha256()
  for example in examples:
    digest.update(example["image"])
    texts = {k: v for k, v in example.items() if k != "image"}
    digest.update(json.dumps(texts, sort_keys=True).encode())
  return digest.hexdigest()[:16]


def _examples(name, split):
  return generation.examples(generate.__name__, name, split)


def _pixels(example) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(example["image"])))


def _read(builder, split):
  source = builder.as_data_source(
    split, decoders={"image": tfds.decode.SkipDecoding()}
  )
  return [scenes.to_record(example) for example in source]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def debug(data_dir):
  """Returns the records of scenes/debug, by split, as TFDS reads them."""
  builder = scenes.ensure_built("scenes/debug", data_dir)
  return {split: _read(builder, split) for split in generate.SPLITS}


# ------------------------------------------------------ the same everywhere


def test_dice_are_a_fixed_function_of_their_key():
  dice = Dice(1, 2)
  assert [dice.below(1000) for _ in range(4)] == DICE_BELOW
  assert dice.bytes(5).tolist() == DICE_BYTES
  np.random.seed(0)  # the global generator has no say
  assert Dice(1, 2).below(1000) == DICE_BELOW[0]
  assert Dice(2, 1).below(10**6) != Dice(1, 2).below(10**6)
  draws = [dice.between(-2, 3) for _ in range(6000)]
  counts = np.bincount(np.array(draws) + 2, minlength=6)
  assert counts.min() > 880 and counts.sum() == 6000 and len(counts) == 6
  assert sorted(dice.shuffled(range(9))) == list(range(9))


@pytest.mark.parametrize("name", generate.SPECS)
def test_examples_are_golden(name):
  spec = generate.SPECS[name]
  made = [generate.example(spec, "train", i) for i in (0, 1, 7)]
  assert _digest(made) == EXAMPLES[name]
  pictures = hashlib.sha256(b"".join(_pixels(e).tobytes() for e in made))
  assert pictures.hexdigest()[:16] == PICTURES[name]


def test_splits_are_golden(debug):
  assert {split: _digest(debug[split]) for split in debug} == SPLITS


def test_debug_is_the_beginning_of_the_default():
  for split, index in (("train", 150), ("validation", 63), ("comp", 63)):
    assert generate.example(
      generate.SPECS["debug"], split, index
    ) == generate.example(generate.SPECS["px64"], split, index)


def test_worker_processes_make_the_same_examples(monkeypatch, debug):
  monkeypatch.setattr(generation, "_FEW", 0)
  monkeypatch.chdir("/")  # they find the package from anywhere
  assert list(_examples("debug", "test")) == debug["test"]


def test_a_failing_worker_is_an_error(monkeypatch):
  monkeypatch.setattr(generation, "_FEW", 0)
  monkeypatch.setattr(sys, "executable", "false")
  with pytest.raises(RuntimeError, match="scenes_generate:debug"):
    list(_examples("debug", "test"))


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
  ("shape", "area"),  # of radius 1, from the textbook
  [
    ("circle", math.pi),
    ("ring", math.pi * (1 - 0.54**2)),
    ("square", 1.72**2),
    ("triangle", 3 * math.sqrt(3) * 0.62**2),
    ("cross", 4 * 0.32 * (2 * 1.12 - 0.32)),
    # A pentagram with inner radius r / cos(36), from its ten triangles.
    (
      "star",
      10
      * 0.5
      * (0.4 / math.cos(math.radians(36)))
      * (0.4 / math.cos(math.radians(72)))
      * math.sin(math.radians(36)),
    ),
  ],
)
def test_shapes_have_their_area(shape, area):
  for radius, angle in ((12, 0), (12, 35), (30, 100)):
    stencil = render.stencil(shape, radius * 256, angle)
    covered = stencil.coverage.sum() / 128
    assert covered == pytest.approx(area * radius**2, rel=0.03)


def test_png_decodes_to_what_was_encoded():
  picture = Dice(3).bytes(48 * 40 * 3).reshape(48, 40, 3)
  data = render.encode_png(picture)
  np.testing.assert_array_equal(_pixels({"image": data}), picture)
  with pytest.raises(ValueError, match="stored block"):
    render.encode_png(np.zeros((150, 150, 3), np.uint8))


@pytest.mark.parametrize("name", generate.SPECS)
def test_every_configuration(name):
  spec = generate.SPECS[name]
  assert name in scenes.Scenes.builder_configs
  made = [generate.example(spec, "train", i) for i in range(60)]
  words = set(language.vocabulary())
  size = spec.image_size
  assert {len(e["objects"]) for e in made} == set(spec.counts)
  for example in made:
    objects, pixels = example["objects"], _pixels(example)
    assert pixels.shape == (size, size, 3)
    assert len(set(example["captions"])) == 5
    for caption in example["captions"]:
      assert words.issuperset(caption.split())
      meaning = language.parse(caption)
      assert language.is_true(meaning, objects), (caption, objects)
    _check_drawing(pixels, objects)
    _check_probes(example)


def _check_drawing(pixels, objects):
  """Checks boxes against each other, and the paint in their middle."""
  size = len(pixels)
  for a, b in itertools.combinations(objects, 2):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a["bbox"], b["bbox"]
    assert ax1 < bx0 or bx1 < ax0 or ay1 < by0 or by1 < ay0
  for thing in objects:
    x0, y0, x1, y1 = (round(edge * size) for edge in thing["bbox"])
    assert 0 < x0 < x1 < size and 0 < y0 < y1 < size
    for limit, at in itertools.product(language.LIMITS, language.center(thing)):
      assert abs(at - limit) > 0.029
    if thing["shape"] != "ring":
      x, y = (x0 + x1) // 2, (y0 + y1) // 2
      paint = pixels[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
      nearest = min(
        render.PALETTE, key=lambda c: np.abs(paint - render.PALETTE[c]).sum()
      )
      assert nearest == thing["color"]


def _check_probes(example):
  objects = example["objects"]
  for phrase in example["phrases"]:
    (term,) = language.parse(phrase["text"]).terms
    (thing,) = [thing for thing in objects if term.fits(thing)]
    assert thing["bbox"] == phrase["bbox"]
  for probe in example["binding"] + example["relation"]:
    assert language.is_true(language.parse(probe["true"]), objects)
    assert not language.is_true(language.parse(probe["false"]), objects)
    assert sorted(probe["true"].split()) == sorted(probe["false"].split())
  distinct = {(t["color"], t["shape"]) for t in objects}
  assert bool(example["relation"]) == (len(distinct) > 1)


# ---------------------------------------------------------------- building


def test_records_are_what_was_generated(debug):
  spec = generate.SPECS["debug"]
  for split, records in debug.items():
    made = [generate.example(spec, split, i) for i in range(len(records))]
    assert records == made and len(made) == spec.num_examples(split)
  ids = [r["image_id"] for records in debug.values() for r in records]
  assert len(set(ids)) == len(ids) and max(ids) < 2**31


def test_building_says_one_line_and_happens_once(tmp_path, capfd, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  first = scenes.ensure_built("scenes/debug:1.0.0")
  out, err = capfd.readouterr()
  assert out == "" and err.count("\n") == 1
  assert err.startswith("scenes/debug: drawing 392 pictures into")
  assert str(first.data_dir) == f"{tmp_path}/scenes/debug/1.0.0"
  before = os.stat(first.data_dir).st_mtime_ns
  again = scenes.ensure_built("scenes/debug")
  assert capfd.readouterr() == ("", "")
  assert os.stat(again.data_dir).st_mtime_ns == before
  assert again.info.splits["train"].num_examples == 200


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("scenes/nope", "scenes/objects5"),
    ("other", "scenes/debug"),
    ("scenes:0.1.0", "only version 1.0.0"),
  ],
)
def test_an_unknown_name_is_refused(name, message, tmp_path):
  with pytest.raises(UserError, match=message):
    scenes.ensure_built(name, str(tmp_path))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="TFDS_DATA_DIR"):
    scenes.ensure_built("scenes/debug", str(tmp_path / "file"))


_BUILD = """
import os, signal, sys
from vlp_jax.data.builders import scenes
made, to_features = [], scenes.Scenes.to_features
def dying(example):
  made.append(example)
  if len(made) == 300:
    os.kill(os.getpid(), signal.SIGKILL)
  return to_features(example)
if sys.argv[2] == "die":
  scenes.Scenes.to_features = staticmethod(dying)
builder = scenes.ensure_built("scenes/debug", sys.argv[1])
assert len(builder.as_data_source("comp")) == 64
assert not {"tensorflow", "jax"} & set(sys.modules)
"""


def _start(data_dir, how):
  return subprocess.Popen(
    [sys.executable, "-c", _BUILD, str(data_dir), how],
    cwd=_ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_killed_build_and_two_builds_at_once(tmp_path):
  victim = _start(tmp_path, "die")
  victim.communicate()
  assert victim.returncode == -signal.SIGKILL
  kept = [path.name for path in (tmp_path / "scenes/debug").iterdir()]
  assert len(kept) == 1 and kept[0].startswith("incomplete.")
  both = [_start(tmp_path, "live") for _ in range(2)]
  said = "".join(process.communicate()[1] for process in both)
  assert [process.returncode for process in both] == [0, 0], said
  assert said.count("drawing") == 1  # the other one waited
  kept = [path.name for path in (tmp_path / "scenes/debug").iterdir()]
  assert kept == ["1.0.0"]
