"""Targets and distances of masked patches against NumPy."""

import jax
import numpy as np
import pytest

from vlp_jax.losses import masked
from vlp_jax.ops import patches as patches_lib


def _image():
  shape = (2, 4, 6, 3)
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _patches(image, size):
  """Normalised pixels of each patch, by loops."""
  mean, std = np.array(patches_lib.MEAN), np.array(patches_lib.STD)
  pixels = (image / 255 - mean) / std
  rows = range(0, image.shape[1], size)
  columns = range(0, image.shape[2], size)
  cut = [pixels[:, r : r + size, c : c + size] for r in rows for c in columns]
  return np.stack([piece.reshape(len(image), -1) for piece in cut], axis=1)


def test_pixels():
  target = masked.patch_targets(_image(), 2, "pixels")
  expected = _patches(_image(), 2)
  assert target.shape == (2, 6, 12)
  np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)


def test_normalized():
  image = _image()
  image[0, :2, :2] = 77  # a patch of one grey hardly deviates
  target = masked.patch_targets(image, 2, "normalized")
  pixels = _patches(image, 2)
  mean = pixels.mean(-1, keepdims=True)
  variance = ((pixels - mean) ** 2).sum(-1, keepdims=True) / (12 - 1)
  expected = (pixels - mean) / np.sqrt(variance + 1e-6)
  np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(target[1].std(-1, ddof=1), 1, atol=1e-4)
  assert np.isfinite(target).all()


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_reconstruction(distance):
  draw = np.random.default_rng(0)
  prediction, target = draw.normal(size=(2, 2, 5, 12)).astype(np.float32)
  loss = masked.reconstruction(prediction, target, distance)
  error = prediction - target
  error = np.abs(error) if distance == "l1" else error * error
  assert loss.shape == (2, 5)
  np.testing.assert_allclose(loss, error.sum(-1) / 12, rtol=1e-5)


def test_reconstruction_refuses_other_distances():
  x = np.zeros((1, 1, 3), np.float32)
  with pytest.raises(KeyError, match="l3"):
    masked.reconstruction(x, x, "l3")


def test_a_patch_has_its_own_gradient():
  x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
  gradient = jax.grad(
    lambda p: masked.reconstruction(p, np.zeros_like(x), "l2")[0, 1]
  )(x)
  np.testing.assert_allclose(gradient[0, 1], x[0, 1] / 2, rtol=1e-6)
  assert not gradient[0, [0, 2]].any()
