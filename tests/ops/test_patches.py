"""Patches and their positions, against loops and another library."""

import math

import jax
import numpy as np
import pytest

from vlp_jax.ops import patches


def test_patchify_cuts_row_by_row():
  image = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
  cut = patches.patchify(image, 2)
  assert cut.shape == (2, 6, 12)
  for row in range(2):
    for column in range(3):
      piece = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
      np.testing.assert_array_equal(
        cut[:, 3 * row + column], piece.reshape(2, 12)
      )


def test_unpatchify_is_the_inverse():
  image = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype(np.float32)
  again = patches.unpatchify(patches.patchify(image, 3), 3)
  np.testing.assert_array_equal(again, image)


def test_normalize():
  # By hand: (255 / 255 - 0.48145466) / 0.26862954, and so on.
  pixels = np.array([[255, 0, 51]], np.uint8)
  expected = [[1.9303361, -1.7520971, (0.2 - 0.40821073) / 0.27577711]]
  normal = patches.normalize(pixels[None])[0]
  np.testing.assert_allclose(normal, expected, rtol=1e-6)


def test_denormalize_returns_every_pixel():
  pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
  again = patches.denormalize(patches.normalize(pixels))
  assert again.dtype == np.uint8
  np.testing.assert_array_equal(again, pixels)
  outside = np.array([-100.0, 100.0, 0.0], np.float32)
  clipped = patches.denormalize(outside)
  np.testing.assert_array_equal(clipped, [0, 255, round(0.40821073 * 255)])


def test_sincos():
  rows, columns, width = 2, 3, 12
  table = patches.sincos((rows, columns), width)
  assert table.shape == (6, 12)
  for row in range(rows):
    for column in range(columns):
      expected = []
      for place in (row, column):
        angles = [place / 10_000 ** (i / 3) for i in range(3)]
        expected += [math.sin(a) for a in angles]
        expected += [math.cos(a) for a in angles]
      np.testing.assert_allclose(
        table[3 * row + column], expected, rtol=1e-6, atol=1e-7
      )
  with pytest.raises(ValueError, match="width % 4"):
    patches.sincos((2, 2), 6)


# What PyTorch's bicubic gives: computed with OpenCV 5.0.0, whose INTER_CUBIC
# is the same function (a = -0.75, half-pixel centres, clamped borders).
_GRID = [[1, -2, 3], [0.5, 4, -1], [2, 0, 7]]
_RESIZED = {
  (5, 4): [
    [1.3081214, -1.9248725, -0.82645017, 3.8117945],
    [0.7038858, 0.6174238, 0.6992413, 0.8903753],
    [0.2487793, 3.288086, 2.5827637, -1.3588867],
    [1.3387903, 1.5886507, 2.6353495, 3.724568],
    [2.325453, -0.36863655, 2.2758515, 8.353128],
  ],
  (2, 2): [[0.4504547, 1.2416763], [1.3853912, 4.1380844]],
}


@pytest.mark.parametrize("new", _RESIZED)
def test_positions_are_resized_as_pytorch_does(new):
  grid = np.array(_GRID, np.float32).reshape(9, 1)
  positions = np.concatenate([grid, -2 * grid], axis=1)
  resized = patches.resize_positions(positions, (3, 3), new)
  expected = np.array(_RESIZED[new]).reshape(-1, 1)
  expected = np.concatenate([expected, -2 * expected], axis=1)
  np.testing.assert_allclose(resized, expected, rtol=1e-5, atol=1e-5)


def _bicubic(table, new):
  """Sixteen neighbours a point, as the definition has it."""

  def weight(x, a=-0.75):
    x = abs(x)
    if x <= 1:
      return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0

  old = table.shape[:2]
  out = np.zeros((*new, table.shape[2]))
  for r in range(new[0]):
    for c in range(new[1]):
      y = (r + 0.5) * old[0] / new[0] - 0.5
      x = (c + 0.5) * old[1] / new[1] - 0.5
      for i in range(math.floor(y) - 1, math.floor(y) + 3):
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
          near = table[np.clip(i, 0, old[0] - 1), np.clip(j, 0, old[1] - 1)]
          out[r, c] += weight(y - i) * weight(x - j) * near
  return out


@pytest.mark.parametrize("old, new", [((4, 3), (7, 5)), ((5, 5), (3, 8))])
def test_positions_are_resized_by_the_definition(old, new):
  table = np.random.default_rng(0).normal(size=(*old, 2)).astype(np.float32)
  resized = patches.resize_positions(table.reshape(-1, 2), old, new)
  expected = _bicubic(table, new).reshape(-1, 2)
  np.testing.assert_allclose(resized, expected, rtol=1e-5, atol=1e-6)


def test_positions_of_the_same_grid_are_untouched():
  positions = jax.numpy.ones((6, 2))
  assert patches.resize_positions(positions, (2, 3), (2, 3)) is positions
  # As many patches, but another shape: not the same.
  moved = patches.resize_positions(
    np.arange(12, dtype=np.float32).reshape(6, 2), (2, 3), (3, 2)
  )
  assert moved.shape == (6, 2)
  assert np.abs(moved - np.arange(12).reshape(6, 2)).max() > 0.5


def test_frames_are_resized():
  rows = np.array([[1.0, -1], [3, 5], [4, 0]], np.float32)
  cases = {
    (2, "zero"): rows[:2],
    (2, "interpolate"): rows[:2],
    (3, "interpolate"): rows,
    (5, "zero"): np.concatenate([rows, np.zeros((2, 2))]),
    (5, "interpolate"): [[1, -1], [2, 2], [3, 5], [3.5, 2.5], [4, 0]],
  }
  for (count, fill), expected in cases.items():
    got = patches.resize_frames(rows, count, fill)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
  one = patches.resize_frames(rows[:1], 3, "interpolate")
  np.testing.assert_allclose(one, [[1, -1]] * 3)
