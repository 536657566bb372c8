"""Grounding against dense maps made with loops, and the geometry of boxes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluators import fakes
from vlp_jax.data import transforms
from vlp_jax.errors import UserError
from vlp_jax.evaluators import _boxes, base, grounding

SIZE = fakes.IMAGE_SIZE

# ------------------------------------------------------------- geometry


def cubic(x):
  """Keys's kernel with a = -1/2."""
  x = abs(x)
  if x < 1:
    return 1.5 * x**3 - 2.5 * x**2 + 1
  return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def enlarged(heat, size):
  """Bicubic, taps beyond the edge left out and the others made to sum to 1."""

  def weights(patches):
    out = np.zeros((size, patches))
    for i in range(size):
      at = (i + 0.5) * patches / size - 0.5
      row = [cubic(at - j) for j in range(patches)]
      out[i] = np.array(row) / sum(row)
    return out

  rows, columns = heat.shape
  dense = np.zeros((size, size))
  y, x = weights(rows), weights(columns)
  for i in range(size):
    for j in range(size):
      dense[i, j] = sum(
        y[i, a] * x[j, b] * heat[a, b]
        for a in range(rows)
        for b in range(columns)
      )
  return dense


def test_sums_equal_those_of_the_enlarged_map():
  rng = np.random.default_rng(0)
  heat = rng.normal(size=(3, 4)).astype(np.float32)
  low = rng.integers(0, 30, (20, 2)) / 4
  high = low + rng.integers(1, 33, (20, 2)) / 4
  boxes = np.hstack([low, high]).clip(0, 12)
  got = _boxes.sums_in(heat, boxes, 12)
  # Quarters of a pixel, as the boxes have them.
  fine = np.kron(enlarged(heat, 12), np.full((4, 4), 1 / 16))
  for n, (x0, y0, x1, y1) in enumerate((4 * boxes).astype(int)):
    assert got[n] == pytest.approx(fine[y0:y1, x0:x1].sum(), abs=1e-5)


def test_iou():
  boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [0, 0, 2, 1]])
  got = _boxes.iou(boxes.astype(float), np.array([0.0, 0, 2, 2]))
  np.testing.assert_allclose(got, [1, 1 / 7, 0, 1 / 2])


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (64, 64), (70, 37)])
@pytest.mark.parametrize("kind", ["crop", "stretch"])
def test_boxes_go_where_the_pixels_go(kind, size):
  """A white box in a black picture, and where it is in the model's."""
  width, height = size
  box = np.array([0.4 * width, 0.3 * height, 0.9 * width, 0.8 * height]).round()
  pixels = np.zeros((height, width, 3), np.uint8)
  x0, y0, x1, y1 = box.astype(int)
  pixels[y0:y1, x0:x1] = 255
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  assert transforms.upright_size(file.getvalue()) == size
  geometry = {
    "crop": transforms.ResizeCenterCrop(32),
    "stretch": transforms.Stretch(32),
  }[kind]
  seen = geometry(Image.fromarray(pixels))[..., 0] > 127
  (got,) = _boxes.in_view(box[None], width, height, geometry)
  columns, rows = seen.any(axis=0).nonzero()[0], seen.any(axis=1).nonzero()[0]
  want = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
  np.testing.assert_allclose(got, want, atol=1)
  if size == (64, 64):
    np.testing.assert_allclose(got, box / 2)


def test_what_the_crop_cuts_off_has_no_area():
  crop = transforms.ResizeCenterCrop(10)
  boxes = np.array([[0, 0, 8, 20], [8, 5, 12, 15], [0, 0, 60, 20]])
  got = _boxes.in_view(boxes, 60, 20, crop)  # the middle third, halved
  assert _boxes.area(got).tolist() == [0, 0, 100]
  boxes = np.array([[18, 0, 24, 20]])
  np.testing.assert_array_equal(
    _boxes.in_view(boxes, 60, 20, crop), [[0, 0, 2, 10]]
  )


def test_upright_size_of_a_turned_picture():
  file, exif = io.BytesIO(), Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (30, 20)).save(file, "JPEG", exif=exif)
  assert transforms.upright_size(file.getvalue()) == (20, 30)
  assert transforms.Decode()(file.getvalue()).size == (20, 30)
  with pytest.raises(transforms.UnreadableImage):
    transforms.upright_size(b"no picture")


# ------------------------------------------------------------ evaluator

SIZES = [(32, 16), (16, 16), (16, 24)]


def ref(box, *sentences):
  return {"ref_id": 0, "sentences": list(sentences), "box": box, "category": ""}


def setting(refs, resize="stretch"):
  texts = [[text for r in rs for text in r["sentences"]] for rs in refs]
  records = fakes.records(texts, refs=[json.dumps(rs) for rs in refs])
  for i, record in enumerate(records):
    record["image"] = fakes.picture(i, SIZES[i])
    record["image_id"] = 70 + i
  tokenizer = fakes.Tokenizer([t for ts in texts for t in ts])
  env = fakes.environment(records, tokenizer)
  env.config.data.eval_resize = resize
  return env


def build(env, path, content, **fields):
  path = path / "dets.json"
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  fields = {"proposals": str(path)} | fields
  return fakes.build("grounding", fakes.Gradcam(), env, **fields)


LEFT, RIGHT, WHOLE = [0, 0, 16, 16], [16, 0, 16, 16], [0, 0, 32, 16]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_best_proposal_counts(tmp_path, batch_size, capsys):
  refs = [
    [ref([0, 0, 16, 16], "l", "left"), ref([18, 0, 32, 16], "r")],
    [ref([2, 2, 8, 8], "thing")],
    [ref([0, 0, 16, 12], "top")],
  ]
  env = setting(refs)
  maps = np.zeros((3, 6, 4, 4), np.float32)
  maps[0, 1, 1, 0] = 1  # l: left, right
  maps[0, 2, 2, 3] = 1  # left: right, wrong
  maps[0, 3, 2, 3] = 1  # r: right
  maps[2, 5] = 0  # top: no opinion, one of two by lot
  dets = {"70": [LEFT, RIGHT, WHOLE], "72": [[0, 0, 16, 12], [0, 12, 16, 12]]}
  rows = [
    {"image_id": int(i), "box": box, "score": 0.5}
    for i, boxes in dets.items()
    for box in boxes
  ]
  for content in (dets, rows):
    got = build(env, tmp_path, content, batch_size=batch_size).run(
      {"gradcam": maps}
    )
    assert got == pytest.approx(
      {
        # One without proposals is wrong.
        "accuracy": (1 + 0 + 1 + 1 / 2 + 0) / 5,
        # Of three boxes the whole has an IoU of one half: right for `left`.
        "accuracy_chance": (2 / 3 + 2 / 3 + 1 / 3 + 1 / 2 + 0) / 5,
        "accuracy_best": 4 / 5,
      }
    )
  warning = capsys.readouterr().err
  assert "1 pictures of 'fake' have no proposals in" in warning
  assert "so 1 expressions count as wrong: fake[1]\n" in warning


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_equals_dense_reference(tmp_path, resize):
  rng = np.random.default_rng(1)
  refs, dets = [], {}
  for i, (width, height) in enumerate(SIZES):
    low = rng.uniform(0, 0.5, (6, 2)) * [width, height]
    size = rng.uniform(0.2, 0.5, (6, 2)) * [width, height]
    boxes = np.hstack([low, size])
    dets[str(70 + i)] = boxes.tolist()
    corners = np.hstack([low, low + size]) + rng.normal(size=(6, 4)) * 0.3
    refs.append(
      [ref(box.tolist(), f"{i} {n}") for n, box in enumerate(corners)]
    )
  env = setting(refs, resize)
  maps = rng.uniform(0, 1, (3, 19, 4, 4)).astype(np.float32) ** 4
  got = build(env, tmp_path, dets).run({"gradcam": maps})

  hits, possible, by_chance = [], [], []
  for i, (width, height) in enumerate(SIZES):
    short = min(width, height)
    for n, r in enumerate(refs[i]):
      # The map over the whole picture, 16 points to a pixel of the model's.
      dense = np.kron(enlarged(maps[i, 1 + 6 * i + n], SIZE), np.ones((16, 16)))
      scores, right = [], []
      for x, y, w, h in dets[str(70 + i)]:
        if resize == "stretch":
          sx, sy, left, top = SIZE / width, SIZE / height, 0, 0
        else:
          sx = sy = SIZE / short
          left, top = (width * sx - SIZE) / 2, (height * sy - SIZE) / 2
        edges = [x * sx - left, y * sy - top]
        edges += [edges[0] + w * sx, edges[1] + h * sy]
        x0, y0, x1, y1 = (round(16 * min(max(e, 0), SIZE)) for e in edges)
        area = max((x1 - x0) * (y1 - y0), 1)
        scores.append(dense[y0:y1, x0:x1].sum() / np.sqrt(area))
        a, b, c, d = r["box"]
        wide = max(0, min(x + w, c) - max(x, a))
        high = max(0, min(y + h, d) - max(y, b))
        both = w * h + (c - a) * (d - b) - wide * high
        right.append(wide * high / both >= 0.5)
      hits.append(right[int(np.argmax(scores))])
      possible.append(any(right))
      by_chance.append(np.mean(right))
  assert got["accuracy"] == pytest.approx(np.mean(hits))
  assert got["accuracy_best"] == np.mean(possible) == 1
  assert got["accuracy_chance"] == pytest.approx(np.mean(by_chance))
  assert 0 < got["accuracy"] < 1


def test_a_map_that_is_no_number_and_a_picture_that_is_none(tmp_path, capsys):
  env = setting([[ref([0, 0, 16, 16], "l")], [ref([0, 0, 9, 9], "x")], []])
  dets = {"70": [LEFT, RIGHT], "71": [[0, 0, 9, 9]]}
  evaluator = build(env, tmp_path, dets)
  maps = np.full((3, 3, 4, 4), np.nan, np.float32)
  assert evaluator.run({"gradcam": maps})["accuracy"] == (1 / 2 + 1) / 2
  env._sources["validation"]._records[1]["image"] = b"no picture"
  got = build(env, tmp_path, dets).run({"gradcam": maps})
  assert got == {
    **{"accuracy": 1 / 4, "accuracy_chance": 1 / 4, "accuracy_best": 1 / 2}
  }
  assert "skipped fake[1]" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[", "not JSON"),
    ("3", "neither a list of rows"),
    ([{"box": LEFT}], "neither a list of rows .*image_id"),
    ({"a picture": [LEFT]}, "neither a list of rows"),
    ({"70": 3}, "neither a list of rows"),
    ({"70": [[1, 2, 3]]}, r"image 70 has no boxes"),
    ({"70": [3]}, r"image 70 has no boxes"),
    ({"70": [[1, 2, "wide", 3]]}, r"image 70 has no boxes"),
    ({"70": [[1, 2, -1, 3]]}, r"image 70 has no boxes"),
    ('{"70": [[1, 2, NaN, 3]]}', r"image 70 has no boxes"),
    ({"9": [LEFT]}, "for any picture of 'fake'"),
    ([], "for any picture of 'fake'"),
  ],
)
def test_broken_proposals(content, message, tmp_path):
  env = setting([[ref([0, 0, 16, 16], "l")]])
  with pytest.raises(UserError, match=message) as caught:
    build(env, tmp_path, content)
  assert "\n" not in str(caught.value) and "dets.json" in str(caught.value)


def test_boxes_without_area_are_left_out(tmp_path, capsys):
  path = tmp_path / "dets.json"
  path.write_text('{"1": [[1, 2, 0, 4], [1, 2, 3, 4, 0.9]], "2": [], "3": []}')
  got = grounding.read_proposals(path)
  assert list(got) == [1]
  np.testing.assert_array_equal(got[1], [[1, 2, 4, 6]])
  assert "1 boxes without area" in capsys.readouterr().err


def test_says_what_is_wrong(tmp_path):
  env = setting([[ref([0, 0, 16, 16], "l")]])
  with pytest.raises(UserError, match=r"proposals .*none.json: No such file"):
    build(env, tmp_path, [], proposals=str(tmp_path / "none.json"))
  with pytest.raises(UserError, match="field proposals is empty"):
    build(env, tmp_path, [], proposals="")
  with pytest.raises(UserError, match="the method has gradcam"):
    build(env, tmp_path, [], readout="gaze")
  for records in (
    fakes.records([["a"]]),
    fakes.records([["a"]], refs=["[]"]),
  ):
    with pytest.raises(base.NotApplicableError, match="referring expressions"):
      build(fakes.environment(records), tmp_path, [])
  for broken in ("{", '[{"box": [1, 2, 3, 4]}]', "3"):
    env = fakes.environment(fakes.records([["a"]], refs=[broken]))
    with pytest.raises(UserError, match=r"fake\[0\]: refs is not a list"):
      build(env, tmp_path, [])
  with pytest.raises(UserError, match="lacks patch_text_map"):
    fakes.build("grounding", fakes.Dual(), env)
