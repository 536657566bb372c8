"""Each operation against its definition, written in NumPy."""

import collections
import pickle

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import randaugment

STRENGTH = 0.7


@pytest.fixture(scope="module")
def pixels():
  """A smooth picture of 40 x 56 that does not use all levels."""
  rng = np.random.default_rng(0)
  small = rng.integers(30, 220, (6, 8, 3), dtype=np.uint8)
  return np.asarray(Image.fromarray(small).resize((56, 40), Image.BICUBIC))


def apply(name, pixels, sign=1.0):
  operation = randaugment.OPERATIONS[name]
  return np.asarray(operation(Image.fromarray(pixels), STRENGTH, sign))


def warp(pixels, source):
  """Reads each pixel at `source(x, y)`, linearly; 128 outside.

  Middles of pixels are at halves; half a pixel along the border counts as
  inside and repeats the pixel there.
  """
  height, width, _ = pixels.shape
  y, x = np.mgrid[:height, :width] + 0.5
  x, y = source(x, y)
  inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  x, y = x - 0.5, y - 0.5
  left, top = np.floor(x).astype(int), np.floor(y).astype(int)
  result = np.zeros(pixels.shape)
  for dx in (0, 1):
    for dy in (0, 1):
      weight = np.abs(1 - dx - (x - left)) * np.abs(1 - dy - (y - top))
      column = np.clip(left + dx, 0, width - 1)
      row = np.clip(top + dy, 0, height - 1)
      result += weight[..., None] * pixels[row, column]
  return np.where(inside[..., None], result, 128)


def turned(x, y, degrees):
  """Where a pixel comes from in a picture that was turned left."""
  angle, u, v = np.deg2rad(degrees), x - 28, y - 20
  return (
    28 + u * np.cos(angle) - v * np.sin(angle),
    20 + u * np.sin(angle) + v * np.cos(angle),
  )


MOVES = {  # a positive sign moves to the right or down
  "shear_x": lambda x, y, sign: (x - sign * 0.21 * y, y),
  "shear_y": lambda x, y, sign: (x, y - sign * 0.21 * x),
  "translate_x": lambda x, y, sign: (x - sign * 7, y),
  "translate_y": lambda x, y, sign: (x, y - sign * 7),
  "rotate": lambda x, y, sign: turned(x, y, sign * 21),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_moves(pixels, name, sign):
  expected = warp(pixels, lambda x, y: MOVES[name](x, y, sign))
  actual = apply(name, pixels, sign).astype(int)
  assert np.abs(actual - expected).max() <= 1
  grey = (actual == 128).all(-1)
  assert 0.05 < grey.mean() < 0.5  # some of it came in


def test_shift_is_exact(pixels):
  right = apply("translate_x", pixels)
  np.testing.assert_array_equal(right[:, 7:], pixels[:, :-7])
  assert (right[:, :7] == 128).all()


def test_identity(pixels):
  np.testing.assert_array_equal(apply("identity", pixels), pixels)


def test_brightness(pixels):
  expected = np.minimum(pixels * 1.36, 255)
  assert np.abs(apply("brightness", pixels) - expected).max() <= 1
  assert expected.max() == 255


def test_sharpness(pixels):
  values, blurred = pixels.astype(float), pixels.astype(float)
  weights = np.ones((3, 3)) / 13
  weights[1, 1] = 5 / 13
  inner = sum(
    weights[i, j] * values[i : i + 38, j : j + 54]
    for i in range(3)
    for j in range(3)
  )
  blurred[1:-1, 1:-1] = np.floor(inner + 0.5)  # uint8; the border stays
  expected = np.clip(blurred + 1.36 * (values - blurred), 0, 255)
  assert np.abs(apply("sharpness", pixels) - expected).max() <= 1


def test_auto_contrast(pixels):
  low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1))
  expected = (pixels - low) * 255 / (high - low)
  actual = apply("auto_contrast", pixels)
  assert np.abs(actual - expected).max() <= 1
  assert actual.min() == 0 and actual.max() == 255
  flat = np.full_like(pixels, 90)
  np.testing.assert_array_equal(apply("auto_contrast", flat), flat)


def test_equalize(pixels):
  expected = np.empty_like(pixels)
  for channel in range(3):
    values = pixels[..., channel]
    counts = np.bincount(values.ravel(), minlength=256)
    # A step for each level, the last occupied one's pixels left out.
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    below = np.concatenate([[0], counts.cumsum()[:-1]])
    levels = np.minimum((below + step // 2) // step, 255)
    expected[..., channel] = levels[values]
  actual = apply("equalize", pixels).astype(int)
  assert np.abs(actual - expected).max() <= 1
  assert (actual != pixels).mean() > 0.5


def test_the_ten_operations():
  assert list(randaugment.OPERATIONS) == [
    *("identity", "auto_contrast", "equalize", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
  ]


def watched(monkeypatch, log):
  for name in randaugment.OPERATIONS:

    def operation(image, strength, sign, name=name):
      log.append((name, strength, sign))
      return image

    monkeypatch.setitem(randaugment.OPERATIONS, name, operation)


def test_what_is_drawn(pixels, monkeypatch):
  log, sizes = [], collections.Counter()
  watched(monkeypatch, log)
  rng = np.random.default_rng(0)
  for _ in range(4000):
    before = len(log)
    randaugment.RandAugment()(pixels, rng)
    sizes[len(log) - before] += 1
  # Each of the two is done half the time.
  shares = [sizes[number] / 4000 for number in range(3)]
  np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.03)
  names = collections.Counter(name for name, _, _ in log)
  assert len(names) == 10
  assert all(300 < count < 500 for count in names.values())
  assert {strength for _, strength, _ in log} == {0.7}
  signs = [sign for _, _, sign in log]
  assert {*signs} == {-1.0, 1.0} and abs(np.mean(signs)) < 0.1


def test_fields(pixels, monkeypatch):
  log = []
  watched(monkeypatch, log)
  augment = randaugment.RandAugment(num_ops=5, magnitude=3, probability=1.0)
  augment(pixels, np.random.default_rng(0))
  assert len(log) == 5 and {strength for _, strength, _ in log} == {0.3}
  log.clear()
  never = randaugment.RandAugment(num_ops=5, probability=0.0)
  never(pixels, np.random.default_rng(0))
  assert not log
  assert repr(randaugment.RandAugment()) == (
    "RandAugment(num_ops=2, magnitude=7, probability=0.5)"
  )
  assert pickle.loads(pickle.dumps(augment)) == augment


def test_result_is_uint8_and_repeatable(pixels):
  augment = randaugment.RandAugment(probability=1.0)
  before = pixels.copy()
  for seed in range(50):
    first = augment(pixels, np.random.default_rng(seed))
    assert first.shape == pixels.shape and first.dtype == np.uint8
    again = augment(pixels, np.random.default_rng(seed))
    np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(pixels, before)
