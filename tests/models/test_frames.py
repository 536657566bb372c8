"""The vision tower on videos: against NumPy, and what frames may see."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from tests.models.test_vision import GRID, SIZE, D
from vlp_jax.models.transformer import Transformer
from vlp_jax.models.vision import VisionTower
from vlp_jax.ops import masking
from vlp_jax.ops import patches as patches_lib

B, F, N = 2, 3, GRID[0] * GRID[1]


def _tower(depth=2, frames=4, cls_token=True, **fields):
  stack = Transformer(
    D, depth, 2, mlp_ratio=2.0, activation="quick_gelu", **fields
  )
  return VisionTower(SIZE, GRID, stack, cls_token, frames=frames)


def _video(frames=F, seed=0):
  shape = (B, frames, GRID[0] * SIZE, GRID[1] * SIZE, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _both(tower, image):
  tokens = tower.embed(image)
  return tokens, tower.encode(tokens)


@functools.cache
def _made(depth=2, frames=4, cls_token=True):
  tower = _tower(depth, frames, cls_token)
  init = functools.partial(tower.init, method=_both)
  params = jax.eval_shape(init, jax.random.key(0), _video())["params"]
  params = toys.random_like(params)

  def run(method):
    return toys.jit(
      lambda x, params=params: tower.apply({"params": params}, x, method=method)
    )

  return params, run(_both), run("encode")


def _expected(params, video, keep=None):
  """One video `[F, H, W, 3]`: one long sequence, and a mask of all pairs."""
  pixels = patches_lib.patchify(patches_lib.normalize(video), SIZE)
  kernel = params["patch"]["kernel"].reshape(-1, D)
  patches = np.asarray(pixels, np.float64) @ kernel + params["pos"]
  if keep is not None:
    patches = patches[:, keep]
  rows = []
  for patch, when in zip(patches, params["temporal"], strict=False):
    rows += [(params["cls"] + params["cls_pos"] + when)[None], patch + when]
  x = reference.layer_norm(params["norm"], np.concatenate(rows))
  size = 1 + patches.shape[1]
  frame, place = np.divmod(np.arange(len(x)), size)
  mask = (frame[:, None] == frame) | (place == 0)[:, None]
  x = reference.transformer(
    params["transformer"], x, mask, activation="quick_gelu"
  )
  return x[place == 0], x[place > 0]


def test_numpy():
  params, run, _ = _made()
  assert params["temporal"].shape == (4, D)
  tokens, (cls, patches) = run(_video())
  assert tokens.shape == (B, F, N, D)
  for i in range(B):
    expected = _expected(params, _video()[i])
    np.testing.assert_allclose(cls[i], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(patches[i], expected[1], rtol=1e-4, atol=1e-5)


def test_dropped_patches():
  """The same places in all frames; [CLS] stays."""
  params, run, encode = _made()
  draw = np.random.default_rng(0)
  keep = np.stack([draw.permutation(N)[:4] for _ in range(B)])
  kept = masking.take(run(_video())[0], keep)
  assert kept.shape == (B, F, 4, D)
  cls, patches = encode(kept)
  for i in range(B):
    expected = _expected(params, _video()[i], keep[i])
    np.testing.assert_allclose(cls[i], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(patches[i], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, F])
def test_all_patches_in_another_order(frames):
  _, run, encode = _made()
  tokens, (cls, patches) = run(_video(frames))
  order = np.random.default_rng(0).permutation(N)
  kept = masking.take(tokens, np.stack([order] * B))
  cls_2, patches_2 = encode(kept)
  np.testing.assert_allclose(cls_2, cls, rtol=1e-5, atol=1e-6)
  patches = patches.reshape(B, frames, N, D)[:, :, order].reshape(B, -1, D)
  np.testing.assert_allclose(patches_2, patches, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slots", [0, 4])
def test_a_video_of_one_frame_is_a_picture(slots):
  _, run, encode = _made(frames=slots)
  video = _video(1)
  tokens, outputs = run(video)
  picture_tokens, picture = run(video[:, 0])
  np.testing.assert_array_equal(tokens[:, 0], picture_tokens)
  toys.assert_trees_equal(outputs, picture)

  def work(tokens):
    operations = re.findall(r"stablehlo\.\w+", encode.lower(tokens).as_text())
    return sorted(name for name in operations if "reshape" not in name)

  assert work(tokens) == work(picture_tokens)
  assert work(run(_video())[0]) != work(tokens)


def test_a_picture_has_the_first_temporal_row():
  params, run, _ = _made()
  plain = {k: v for k, v in params.items() if k != "temporal"}
  for name in ("pos", "cls_pos"):
    plain[name] = params[name] + params["temporal"][0]
  expected = _made(frames=0)[1](_video()[:, 0], plain)
  got = run(_video()[:, 0])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    got,
    expected,
  )


def test_frames_have_an_order_only_by_their_rows():
  params, run, _ = _made()
  order = np.array([2, 0, 1])
  _, (cls, patches) = run(_video())
  patches = patches.reshape(B, F, N, D)[:, order].reshape(B, -1, D)
  rows = np.array(params["temporal"])
  rows[:F] = rows[order]
  _, (cls_2, patches_2) = run(_video()[:, order], params | {"temporal": rows})
  np.testing.assert_allclose(cls_2, cls[:, order], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(patches_2, patches, rtol=1e-5, atol=1e-5)
  _, (cls_3, _) = run(_video()[:, order])
  assert np.abs(cls_3 - cls[:, order]).max() > 1e-2


def test_patches_learn_of_other_frames_through_frame_tokens():
  """One block: not at all. Two: they do."""
  tokens = np.asarray(_made()[1](_video())[0])
  changed = tokens.copy()
  changed[:, 1:, :, 0] += 1.0
  for depth in (1, 2):
    encode = _made(depth)[2]
    (cls, patches), (cls_2, patches_2) = encode(tokens), encode(changed)
    assert np.abs(cls_2[:, 0] - cls[:, 0]).max() > 1e-3
    own, own_2 = patches[:, :N], patches_2[:, :N]
    if depth == 1:
      np.testing.assert_array_equal(own_2, own)
    else:
      assert np.abs(own_2 - own).max() > 1e-4


def test_without_cls_frames_are_pictures():
  _, run, _ = _made(frames=0, cls_token=False)
  tokens, (cls, patches) = run(_video())
  assert cls is None and tokens.shape == (B, F, N, D)
  for f in range(F):
    _, (_, expected) = run(_video()[:, f])
    got = patches[:, f * N : (f + 1) * N]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@functools.cache
def _gradient(scan, remat):
  tower, video = _tower(scan=scan, remat=remat), _video()
  params = _made()[0]

  def loss(params):
    cls, patches = tower.apply({"params": params}, video, method=_both)[1]
    return jnp.sum(jnp.sin(cls)) + jnp.sum(jnp.sin(patches))

  return toys.jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
  "scan, remat", [(True, "full"), (True, "dots"), (False, "none")]
)
def test_scan_and_remat_change_nothing(scan, remat):
  toys.assert_gradients_close(_gradient(scan, remat), _gradient(True, "none"))


def test_dropout_is_drawn_for_both_kinds_of_tokens():
  tower = _tower(depth=1, dropout=0.5)
  tokens = _made(1)[1](_video())[0]
  draw = toys.jit(
    lambda key: tower.apply(
      {"params": _made(1)[0]}, tokens, method="encode", rngs={"dropout": key}
    )
  )
  first, second = draw(jax.random.key(0)), draw(jax.random.key(1))
  for a, b in zip(first, second, strict=True):
    assert np.isfinite(a).all() and np.abs(a - b).max() > 1e-2


def test_more_frames_than_rows():
  params, _, _ = _made()
  rows, video = params["temporal"], _video(6)
  stretched = np.stack(
    [np.interp(np.linspace(0, 3, 6), np.arange(4), x) for x in rows.T], 1
  )
  padded = np.concatenate([rows, np.zeros((2, D))])
  for fill, expected in (("zero", padded), ("interpolate", stretched)):
    tower = _tower().clone(frame_fill=fill)
    embed = functools.partial(tower.apply, method="embed")
    got = embed({"params": params}, video)
    same = {**params, "temporal": expected.astype(np.float32)}
    want = _tower(frames=6).apply({"params": same}, video, method="embed")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
