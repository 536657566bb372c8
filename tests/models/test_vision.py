"""The vision tower: against NumPy, at other resolutions, on some patches."""

import functools

import jax
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from vlp_jax.models.transformer import Transformer
from vlp_jax.models.vision import HMLPStem, VisionTower
from vlp_jax.ops import patches as patches_lib

D, SIZE, GRID = 8, 4, (3, 3)


def _image(rows=3, columns=3, seed=0):
  shape = (2, rows * SIZE, columns * SIZE, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _both(tower, image):
  tokens = tower.embed(image)
  return tokens, tower.encode(tokens)


@functools.cache
def _tower(cls_token=True, pre_norm=True, positions="learned"):
  stack = Transformer(width=D, depth=2, num_heads=2, mlp_ratio=2.0)
  tower = VisionTower(
    SIZE,
    GRID,
    stack,
    cls_token=cls_token,
    positions=positions,
    pre_norm=pre_norm,
  )
  init = functools.partial(tower.init, method=_both)
  shapes = jax.eval_shape(init, jax.random.key(0), _image())
  params = toys.random_like(shapes["params"])
  apply = functools.partial(tower.apply, {"params": params})
  run = toys.jit(functools.partial(apply, method=_both))
  return params, run, toys.jit(functools.partial(apply, method="encode"))


def _embed(p, image, positions):
  pixels = patches_lib.patchify(patches_lib.normalize(image), SIZE)
  kernel = p["patch"]["kernel"].reshape(-1, D)
  return np.asarray(pixels, np.float64) @ kernel + positions


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_numpy(cls_token, pre_norm):
  params, run, _ = _tower(cls_token, pre_norm)
  tokens, (cls, patches) = run(_image())
  expected = _embed(params, _image(), params["pos"])
  np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)
  assert (cls is not None) == cls_token
  for i, x in enumerate(expected):
    if cls_token:
      x = np.concatenate([(params["cls"] + params["cls_pos"])[None], x])
    if pre_norm:
      x = reference.layer_norm(params["norm"], x)
    x = reference.transformer(params["transformer"], x)
    if cls_token:
      np.testing.assert_allclose(cls[i, 0], x[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(patches[i], x[-9:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, columns", [(5, 5), (2, 4)])
def test_another_resolution(rows, columns):
  params, run, _ = _tower()
  image = _image(rows, columns)
  tokens, (cls, patches) = run(image)
  resized = patches_lib.resize_positions(params["pos"], GRID, (rows, columns))
  expected = _embed(params, image, resized)
  np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)
  assert cls.shape == (2, 1, D)
  assert patches.shape == (2, rows * columns, D)


def test_sincos_is_where_learned_positions_start():
  stack = Transformer(width=D, depth=1, num_heads=2)
  tower = VisionTower(SIZE, GRID, stack, False, positions="sincos")
  init = toys.jit(functools.partial(tower.init, method="embed"))
  params = init(jax.random.key(0), _image())["params"]
  np.testing.assert_array_equal(params["pos"], patches_lib.sincos(GRID, D))


def test_patches_may_come_in_any_order_and_number():
  _, run, encode = _tower()
  tokens, (cls, patches) = run(_image())
  order = np.random.default_rng(0).permutation(9)
  cls_2, patches_2 = encode(tokens[:, order])
  np.testing.assert_allclose(cls_2, cls, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(patches_2, patches[:, order], rtol=1e-5, atol=1e-6)
  few, _ = encode(tokens[:, :4])
  assert np.abs(few - cls).max() > 1e-3  # the others did count


@pytest.mark.parametrize("size", [4, 8, 16])
def test_hmlp_stem(size):
  """Against loops over blocks of 4 x 4 pixels, and over the merges of four."""
  stem = HMLPStem(size, D, "relu2")
  pixels = np.random.default_rng(0).normal(size=(2, 3, size * size * 3))
  pixels = pixels.astype(np.float32)
  shapes = jax.eval_shape(stem.init, jax.random.key(0), pixels)["params"]
  params = toys.random_like(shapes)
  out = toys.jit(stem.apply)({"params": params}, pixels)
  assert out.shape == (2, 3, D)
  for i, n in np.ndindex(2, 3):
    x, step = pixels[i, n].reshape(size, size, 3).astype(np.float64), 4
    for level in range(len(params)):
      rows = len(x) // step
      blocks = [
        [
          x[r * step : (r + 1) * step, c * step : (c + 1) * step].ravel()
          for c in range(rows)
        ]
        for r in range(rows)
      ]
      x = reference.linear(params[f"Dense_{level}"], np.array(blocks))
      if rows > 1:
        x = np.maximum(x, 0) ** 2
      step = 2
    assert x.shape == (1, 1, D)
    np.testing.assert_allclose(out[i, n], x[0, 0], rtol=1e-4, atol=1e-5)


def test_hmlp_stem_starts_as_flax_has_it():
  stem = HMLPStem(8, 64, "relu2")
  params = stem.init(jax.random.key(0), np.zeros((1, 1, 192)))["params"]
  for layer, fan_in in (("Dense_0", 48), ("Dense_1", 4 * 32)):
    kernel = np.asarray(params[layer]["kernel"])
    assert kernel.shape[0] == fan_in and not params[layer]["bias"].any()
    error = abs(kernel.std() * fan_in**0.5 - 1)
    assert error < 5 / (2 * kernel.size) ** 0.5
