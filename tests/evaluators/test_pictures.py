"""Pictures are made where they can be, and no text lies over another."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tests.evaluators import fakes
from vlp_jax.errors import UserError
from vlp_jax.evaluators import _curves, _plots, base, pictures

LONG = (
  "Ein sehr langer Satz über 3 $ Größe_x^2 und vieles mehr, der nicht aufhört "
) * 6
TEXTS = [LONG, "写真の中に大きな赤い丸と青い星があります。" * 9, "x" * 300, "a"]


class Everything(fakes.Captioner):
  """Has every capability."""

  def term_weights(self, step):
    return {"itc": 1.0, "caption": 2.0}

  def reconstruct(self, params, batch, key):
    image = batch["image"]
    mask = jnp.zeros((len(image), 4), bool).at[:, 0].set(True)
    return {"masked": image // 2, "prediction": 255 - image, "mask": mask}


class Plain(fakes.Dual):
  def term_weights(self, step):
    return {"itc": 1.0}


def thing(bbox):
  return {"color": "red", "shape": "ring", "size": "large", "bbox": bbox}


BOXES = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]


def setting(annotated: bool, count=5):
  texts = [TEXTS[i % 4] + f" {i}" for i in range(count)]
  if annotated:
    texts = [f"a red ring with number {i} and more" for i in range(count)]
  extra = {}
  if annotated:
    extra["objects"] = [[thing(b) for b in BOXES]] * count
    extra["phrases"] = [
      [{"text": LONG, "bbox": BOXES[0]}, {"text": "a", "bbox": BOXES[1]}]
    ] * count
  tokenizer = fakes.Tokenizer(texts)
  env = fakes.environment(
    fakes.records([[t] for t in texts], **extra), tokenizer
  )
  rng = np.random.default_rng(0)
  params = {
    "image": fakes.unit(rng.normal(size=(count, 4))),
    "text": fakes.unit(rng.normal(size=(4 * count + 9, 4))),
    "caption": np.arange(1, count + 1, dtype=np.int32),
  }
  for readout in Everything.readouts:
    params[readout] = rng.normal(size=(count, 60, 4, 4)).astype(np.float32)
  return env, params


def write_metrics(folder):
  lines = []
  for step in range(1, 40):
    values = {"train/loss": 9 / step, "train/itc": 3 / step}
    if step == 5:
      values["train/caption"] = None
    if step % 10 == 0:
      for way, k in itertools.product(("i2t", "t2i"), (1, 5, 10)):
        values[f"val/retrieval/{way}_r{k}"] = step * k / 400
        values[f"val/retrieval/{way}_r{k}_chance"] = k / 400
    lines.append(json.dumps({"step": step} | values))
  (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "tr')


@pytest.fixture
def figures(monkeypatch):
  """The figures of all sheets that are saved."""
  kept = {}
  save = _plots.Sheet.save

  def keep(sheet, path):
    kept[path.stem] = sheet.figure
    return save(sheet, path)

  monkeypatch.setattr(_plots.Sheet, "save", keep)
  return kept


def assert_texts_apart(figure):
  renderer = FigureCanvasAgg(figure).get_renderer()
  boxes = [
    (text.get_text(), text.get_window_extent(renderer))
    for text in figure.texts
    if text.get_text()
  ]
  for axes in figure.axes:
    if axes.images:  # a picture; the curves' axes have ticks and more
      boxes.append(("picture", axes.get_window_extent()))
  whole = figure.bbox
  for name, box in boxes:
    assert box.x0 >= 0 and box.x1 <= whole.x1 + 1, name
    assert box.y0 >= 0 and box.y1 <= whole.y1 + 1, name
  for (name, a), (other, b) in itertools.combinations(boxes, 2):
    wide = min(a.x1, b.x1) - max(a.x0, b.x0)
    high = min(a.y1, b.y1) - max(a.y0, b.y0)
    assert wide < 1 or high < 1, (name, other)


ALL = [
  *("retrieval_text_to_image", "retrieval_image_to_text", "heatmaps"),
  *("captions", "reconstruction", "loss_curves"),
]


@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_everything_is_drawn_and_nothing_overlaps(tmp_path, figures, annotated):
  env, params = setting(annotated)
  write_metrics(tmp_path)
  paths = pictures.make_pictures(Everything(), params, env, tmp_path)
  assert paths == [tmp_path / "pictures" / f"{name}.png" for name in ALL]
  for path in paths:
    with Image.open(path) as image:
      assert max(image.size) < 2500
      assert np.asarray(image).std() > 10
    assert_texts_apart(figures[path.stem])


def test_one_example_of_a_plain_method(tmp_path, figures):
  env, params = setting(False, count=1)
  paths = pictures.make_pictures(Plain(), params, env, tmp_path)
  assert [path.stem for path in paths] == ALL[:2]
  for figure in figures.values():
    assert_texts_apart(figure)


def test_without_any_split_only_the_curves_are_left(tmp_path, monkeypatch):
  env, params = setting(False)

  def missing(self, split):
    raise UserError("no such split")

  monkeypatch.setattr(base.Env, "source", missing)
  assert pictures.make_pictures(Plain(), params, env, tmp_path) == []
  write_metrics(tmp_path)
  paths = pictures.make_pictures(Plain(), params, env, tmp_path)
  assert [path.stem for path in paths] == ["loss_curves"]


def test_gallery_marks_own_and_true_pictures(figures, tmp_path):
  objects = [[thing(BOXES[0])], [thing(BOXES[1])], []]
  texts = [["a red ring"], ["a red ring"], ["a blue star"]]
  env = fakes.environment(
    fakes.records(texts, objects=objects, phrases=[[], [], []]),
    fakes.Tokenizer(["a red ring", "a blue star"]),
  )
  params = {
    "image": np.float32([[1, 0], [0.9, 0], [0, 1]]),
    "text": np.float32([[0, 0], [1, 0], [0, 1]]),
  }
  pictures.make_pictures(Plain(), params, env, tmp_path)
  texts = [t.get_text() for t in figures["retrieval_text_to_image"].texts]
  verdicts = [t.split("  ")[0] for t in texts if "  " in t]
  assert verdicts == [
    *("right", "also true", "wrong"),
    *("also true", "right", "wrong"),
    *("right", "wrong", "wrong"),
  ]
  assert "own picture: place 2 of 3" in texts


def test_fold():
  assert _plots.fold("one two  three", 10, 10, 3) == ["one two three"]
  folded = _plots.fold("word " * 50, 1, 10, 3)
  assert len(folded) == 3 and folded[-1].endswith("…")
  folded = _plots.fold("word " * 5 + "i" * 50, 1, 10, 99)
  assert "".join(folded).replace(" ", "") == "word" * 5 + "i" * 50
  widths = [len(_plots.fold(x * 50, 1, 10, 9)[0]) for x in ("漢", "W", "i")]
  assert widths == sorted(widths) and widths[0] < widths[2] / 2
  assert _plots.fold("", 1, 10, 3) == [""]
  assert _plots.fold("漢字", 0.01, 10, 5) == ["漢", "字"]


def test_curves_of_a_broken_file(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "a": 1}\n[]\n{"step": 1, "a": 2}\n{"st')
  steps, values = _curves.read(path)["a"]
  assert steps.tolist() == [1] and values.tolist() == [2]
  assert _curves.read(tmp_path / "none") == {}


class OnlyGradcam(fakes.Gradcam, Plain):
  """Points by gradients, matches, and writes nothing."""


@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_heat_maps_of_a_method_that_only_points(tmp_path, figures, annotated):
  env, params = setting(annotated)
  env.config.evals.pointing = {"type": "pointing", "readout": ""}
  rng = np.random.default_rng(1)
  maps = rng.uniform(size=(5, 60, 4, 4)).astype(np.float32)
  params["gradcam"] = maps
  paths = pictures.make_pictures(OnlyGradcam(), params, env, tmp_path)
  assert [path.stem for path in paths] == ALL[:3]
  assert_texts_apart(figures["heatmaps"])
  words = [t.get_text() for t in figures["heatmaps"].texts]
  assert any("readout: gradcam" in " ".join(w.split()) for w in words)
  verdicts = [w for w in words if w in ("hit", "miss")]
  assert len(verdicts) == (10 if annotated else 0)

  params["gradcam"] = (
    maps * np.float32([0, np.nan, 1, 1, 1])[:, None, None, None]
  )
  pictures.make_pictures(OnlyGradcam(), params, env, tmp_path)
  assert_texts_apart(figures["heatmaps"])
  words = [t.get_text() for t in figures["heatmaps"].texts]
  flat = [w for w in words if w.startswith("no answer")]
  # The second caption has two words.
  assert len(flat) == (4 if annotated else 5)


def test_words_to_point_at():
  record = {"captions": ["a b - a dog, dog; c ... "]}
  assert pictures._phrases(record) == [*(("dog", []), ("a", []), ("b", []))]


# ------------------------------------------------------------------ clips


def test_a_mosaic_and_what_is_in_it():
  frames = np.arange(3 * 2 * 4 * 3).reshape(3, 2, 4, 3)
  shown = _plots.mosaic(frames, -1)
  assert shown.shape == (4, 8, 3)
  np.testing.assert_array_equal(shown[:2, :4], frames[0])
  np.testing.assert_array_equal(shown[:2, 4:], frames[1])
  np.testing.assert_array_equal(shown[2:, :4], frames[2])
  assert (shown[2:, 4:] == -1).all()
  sizes = [len(_plots.mosaic(np.zeros((n, 1, 1)), 0)) for n in (1, 2, 4, 5, 16)]
  assert sizes == [1, 2, 2, 3, 4]
  boxes = [[[0, 0, 1, 1]], [], [[0.5, 0, 1, 0.5]], [[0, 0.5, 1, 1]]]
  assert _plots.in_mosaic(boxes) == [
    *([0, 0, 0.5, 0.5], [0.25, 0.5, 0.5, 0.75], [0.5, 0.75, 1, 1])
  ]


CLIP = 3  # frames that are shown


def clip_setting(annotated, count=5):
  """Clips of five frames, in which a ring moves and a star does not."""
  texts = [f"number {i} of the clips" for i in range(count)]
  extra = {}
  if annotated:
    texts = ["a red ring moves left and a blue star stays"] * count
    corners = [(0.1 * i, 0.0, 0.1 * i + 0.5, 0.5) for i in range(5)]
    ring = {**thing(corners[2]), "boxes": corners, "motion": "moves left"}
    star = {**thing(BOXES[1]), "boxes": [BOXES[1]] * 4 + [None]}
    star |= {"color": "blue", "shape": "star", "motion": "stays"}
    extra = {"objects": [[ring, star]] * count, "motion": [[]] * count}
  records = fakes.records([[text] for text in texts], **extra)
  for i, record in enumerate(records):
    record["image"] = [fakes.picture(i)] * 5
  env = fakes.environment(records, fakes.Tokenizer(texts))
  env.config.data.num_frames = CLIP
  rng = np.random.default_rng(0)
  params = {
    "image": fakes.unit(rng.normal(size=(count, 4))),
    "text": fakes.unit(rng.normal(size=(60, 4))),
    "gradcam": rng.uniform(size=(count, 60, CLIP, 4, 4)).astype(np.float32),
  }
  return env, params


@pytest.mark.parametrize("annotated", [True, False])
def test_clips_are_drawn(tmp_path, figures, annotated):
  env, params = clip_setting(annotated)
  if annotated:
    peak = np.zeros((CLIP, 4, 4), np.float32)
    peak[1, 1, 2] = 1  # in the ring of the second frame alone
    params["gradcam"][:] = peak
  paths = pictures.make_pictures(OnlyGradcam(), params, env, tmp_path)
  assert [path.stem for path in paths] == ALL[:3]
  for name in ALL[:3]:
    assert_texts_apart(figures[name])
    words = " ".join(t.get_text() for t in figures[name].texts)
    assert "A clip is shown as its frames, row by row." in words
  shown = [axes.images[-1].get_array() for axes in figures["heatmaps"].axes]
  assert shown[0].shape == (2 * fakes.IMAGE_SIZE, 2 * fakes.IMAGE_SIZE, 3)
  blank = np.zeros((8, 8), bool)
  blank[4:, 4:] = True  # there is no fourth frame
  np.testing.assert_array_equal(np.ma.getmaskarray(shown[1]), blank)
  boxes = [
    [patch.get_bbox().extents.round(4).tolist() for patch in axes.patches[::2]]
    for axes in figures["heatmaps"].axes[1:3]
  ]
  if not annotated:
    assert boxes == [[], []]
    return
  # The first, the middle and the last frame, in three of four quarters.
  assert boxes == [
    [[0, 0, 0.25, 0.25], [0.6, 0, 0.85, 0.25], [0.2, 0.5, 0.45, 0.75]],
    [[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 1, 0.5]],
  ]
  texts = [t.get_text() for t in figures["heatmaps"].texts]
  named = texts.index("a red ring moves left")
  assert texts[named + 1 : named + 4] == ["hit", "a blue star stays", "miss"]
