"""Visual tokenizers: their codes, what they are fitted on, and their files."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests import toys
from tests.models import dalle_reference as reference
from vlp_jax.errors import UserError
from vlp_jax.models.visual_tokenizers import DalleCodes, PatchCodes
from vlp_jax.ops import patches as patches_lib

SIZE = 4
GRID, VOCAB, WIDTH = 3, 11, 8


def _images(count=6, side=12, seed=0):
  shape = (count, side, side, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _blocks(count, side, size, seed=0):
  """Pictures of squares of one colour, `size` pixels wide."""
  return _images(count, side // size, seed).repeat(size, 1).repeat(size, 2)


def _dalle(path="", **fields):
  fields = dict(vocab_size=VOCAB, width=WIDTH, blocks=1) | fields
  return DalleCodes(str(path), GRID, **fields)


def _weights(tokenizer):
  """A drawn state; of its codes none is the most likely everywhere."""
  side = 8 * GRID
  encoder = tokenizer._encoder()
  params = reference.parameters(encoder, side, side, 3)
  pixels = np.float32(_blocks(8, side, 4, seed=1) / 255)
  logits = toys.jit(encoder.apply)({"params": params}, pixels)
  params["output"]["bias"] -= np.mean(logits, (0, 1, 2))
  return params


def _save(path, state):
  np.savez(path, **traverse_util.flatten_dict(state, sep="/"))
  return path


@pytest.mark.parametrize("tokenizer", [PatchCodes(16, SIZE), _dalle()])
def test_empty_has_the_shapes_of_a_state(tokenizer, tmp_path):
  if isinstance(tokenizer, DalleCodes):
    tokenizer = _dalle(_save(tmp_path / "w.npz", _weights(tokenizer)))
  assert hash(tokenizer) == hash(tokenizer)
  state = tokenizer.start(lambda: iter([_images()]))
  empty = jax.jit(tokenizer.empty)()
  shapes = jax.eval_shape(tokenizer.empty)
  assert jax.tree.structure(state) == jax.tree.structure(empty)
  for made, zeros, leaf in zip(
    *map(jax.tree.leaves, (state, empty, shapes)), strict=True
  ):
    assert isinstance(made, np.ndarray) and made.dtype == np.float32
    assert made.shape == zeros.shape == leaf.shape
    assert leaf.dtype == np.float32 and not zeros.any()
  codes = jax.jit(tokenizer.codes)(state, _images())
  assert codes.shape == (6, 9) and codes.dtype == jnp.int32
  assert 0 <= codes.min() <= codes.max() < tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", [PatchCodes(16, SIZE), _dalle()])
def test_no_gradient_reaches_the_state(tokenizer):
  state = jax.tree.map(lambda x: x + 0.1, tokenizer.empty())

  def loss(state, x):
    return jnp.sum(tokenizer.codes(state, _images(2)) * x)

  gradient = jax.jit(jax.grad(loss))(state, 1.0)
  assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# --- PatchCodes -------------------------------------------------------------


def test_patches_are_named_row_by_row():
  """Pictures made of six flat colours, each of which is a code."""
  colours = _images(1, 3).reshape(9, 3)[:6]
  draw = np.random.default_rng(0)
  planted = draw.integers(0, 6, (10, 3, 3))
  images = colours[planted].repeat(SIZE, 1).repeat(SIZE, 2)
  tokenizer = PatchCodes(8, SIZE)
  state = tokenizer.start(lambda: iter([images]))
  codes = np.asarray(tokenizer.codes(state, images))
  pairs = {*zip(planted.ravel(), codes.ravel(), strict=True)}
  assert len(pairs) == 6 == len({code for _, code in pairs})


def test_codes_are_of_the_nearest_patch():
  images = _images(8)
  tokenizer = PatchCodes(5, SIZE, iterations=3)
  state = tokenizer.start(lambda: iter([images]))
  x = np.float64(patches_lib.patch_pixels(images, SIZE))
  squares = ((x[:, :, None] - state["centroids"]) ** 2).sum(-1)
  codes = jax.jit(tokenizer.codes)(state, images)
  np.testing.assert_array_equal(codes, squares.argmin(-1))


def test_the_same_start_each_time_and_from_a_stream_without_end():
  tokenizer = PatchCodes(8, SIZE, num_patches=60, num_pictures=10)
  batches = [_images(4, seed=seed) for seed in range(3)]
  state = tokenizer.start(lambda: iter(batches))
  again = tokenizer.start(lambda: itertools.cycle(batches))
  toys.assert_trees_equal(again, state)


def test_patches_are_drawn_evenly_from_the_first_pictures():
  pictures, used = 40, 30
  images = np.broadcast_to(
    np.arange(pictures, dtype=np.uint8)[:, None, None, None],
    (pictures, 12, 12, 3),
  )
  taken = []

  def stream():
    for batch in images.reshape(-1, 4, 12, 12, 3):
      taken.append(len(batch))
      yield batch

  tokenizer = PatchCodes(8, SIZE, num_patches=90, num_pictures=used)
  sample = tokenizer._sample(stream())
  assert sample.shape == (90, 48) and sum(taken) == 32
  counts = np.bincount(sample[:, 0], minlength=pictures)
  assert not counts[used:].any()
  # 3 of 9 are expected of each picture; of 10 pictures 30, +- 3.6.
  assert all(abs(counts[i : i + 10].sum() - 30) < 15 for i in (0, 10, 20))
  every = PatchCodes(8, SIZE, num_pictures=used)._sample(stream())
  np.testing.assert_array_equal(np.bincount(every[:, 0]), [9] * used)


def test_no_pictures():
  with pytest.raises(UserError, match="no training picture"):
    PatchCodes(8, SIZE).start(lambda: iter([]))


# --- DalleCodes -------------------------------------------------------------


def test_the_most_likely_code():
  """At 8 pixels a patch nothing is resized."""
  tokenizer, images = _dalle(), _blocks(2, 8 * GRID, 4)
  params = _weights(tokenizer)
  codes = jax.jit(tokenizer.codes)(params, images)
  for picture, found in zip(images, codes, strict=True):
    logits = reference.encode(params, picture / 255, 1)
    np.testing.assert_array_equal(found, logits.argmax(-1).ravel())
  assert len(np.unique(codes)) > 3


def _shrink(x, side):
  """Cubic convolution (a = -0.5) as wide as the step, along the first axis."""
  step = len(x) / side
  out = np.zeros((side, *x.shape[1:]))
  for i in range(side):
    at = (np.arange(len(x)) + 0.5 - (i + 0.5) * step) / step
    far = np.abs(at)
    near = 1.5 * far**3 - 2.5 * far**2 + 1
    tail = -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2
    weights = np.where(far <= 1, near, np.where(far < 2, tail, 0))
    out[i] = np.tensordot(weights / weights.sum(), x, 1)
  return out


def test_pictures_of_another_size_are_resized():
  tokenizer, images = _dalle(), _blocks(8, 16 * GRID, 3)
  images = np.where(images < 128, 0, 255).astype(np.uint8)  # overshoots
  params = _weights(tokenizer)
  codes = jax.jit(tokenizer.codes)(params, images)
  for picture, found in zip(images, codes, strict=True):
    small = _shrink(picture / 255, 8 * GRID).swapaxes(0, 1)
    small = np.clip(_shrink(small, 8 * GRID).swapaxes(0, 1), 0, 1)
    logits = reference.encode(params, small, 1).reshape(GRID**2, VOCAB)
    np.testing.assert_array_equal(found, logits.argmax(-1))
  assert len(np.unique(codes)) > 3


def test_weights_are_loaded(tmp_path):
  weights = _weights(_dalle())
  path = _save(tmp_path / "encoder.npz", weights)
  state = _dalle(path).start(functools.partial(pytest.fail, "not needed"))
  toys.assert_trees_equal(state, weights)


def _changed(state, **changes):
  flat = traverse_util.flatten_dict(state, sep="/") | changes
  flat = {name: x for name, x in flat.items() if x is not None}
  return traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize(
  "spoil, hint",
  [
    (lambda path: path.unlink(), "No such file"),
    (lambda path: path.write_bytes(b""), "no .npz"),
    (lambda path: path.write_bytes(b"\x80\x02}q\x00."), "no .npz"),
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), "no .npz"),
    (lambda path: np.save(path.open("wb"), np.zeros(3)), "no .npz"),
    (
      lambda path: _save(
        path, _changed(_weights(_dalle()), **{"input/bias": None})
      ),
      "input/bias is missing;",
    ),
    (
      lambda path: _save(path, _changed(_weights(_dalle()), extra=np.ones(1))),
      "extra is unknown;",
    ),
    (
      lambda path: _save(path, _weights(_dalle(width=16))),
      "instead of (",
    ),
  ],
)
def test_bad_files_end_in_one_line(tmp_path, spoil, hint):
  path = _save(tmp_path / "encoder.npz", _weights(_dalle()))
  spoil(path)
  with pytest.raises(UserError) as error:
    _dalle(path).start(lambda: iter([]))
  message = str(error.value)
  assert hint in message and str(path) in message
  assert "python -m vlp_jax.convert.dalle" in message
  assert "\n" not in message and len(message) < 400


def test_no_path():
  with pytest.raises(UserError, match="no path"):
    _dalle().start(lambda: iter([]))
