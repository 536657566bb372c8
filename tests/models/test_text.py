"""The text towers against NumPy; padding counts for nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from vlp_jax.models.text import BidirectionalText, TextTower
from vlp_jax.models.transformer import Transformer

D, LENGTH = 8, 7
LENGTHS = np.array([7, 3, 5, 1], np.int32)
KINDS = [("cls", False), ("cls", True), ("eot", False)]


@functools.cache
def _tower(pool, legacy):
  stack = Transformer(width=D, depth=2, num_heads=2, mlp_ratio=2.0)
  tower = TextTower(11, LENGTH, stack, pool, legacy)
  shapes = jax.eval_shape(tower.init, jax.random.key(0), _text(), LENGTHS)
  params = toys.random_like(shapes["params"])
  return tower, params, toys.jit(functools.partial(tower.apply))


def _text(seed=0):
  draw = np.random.default_rng(seed)
  return draw.integers(1, 11, (len(LENGTHS), LENGTH)).astype(np.int32)


def _numpy(p, text, length, pool, legacy):
  x = p["embedding"]["embedding"][text] + p["pos"][: len(text)]
  mask = np.tril(np.ones((len(text) + 1,) * 2, bool))
  if pool == "eot":
    x = reference.transformer(p["transformer"], x, mask[:-1, :-1])
    return x[length - 1], x
  x = np.concatenate([x, (p["cls"] + p["cls_pos"])[None]])
  real = np.arange(len(text)) < length
  mask[-1] = [True, *real] if legacy else [*real, True]
  x = reference.transformer(p["transformer"], x, mask)
  return x[-1], x[:-1]


@pytest.mark.parametrize("pool, legacy", KINDS)
def test_numpy(pool, legacy):
  _, params, apply = _tower(pool, legacy)
  pooled, tokens = apply({"params": params}, _text(), LENGTHS)
  for i, length in enumerate(LENGTHS):
    expected = _numpy(params, _text()[i], length, pool, legacy)
    np.testing.assert_allclose(pooled[i], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tokens[i], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool, legacy", KINDS)
def test_what_stands_in_the_padding_counts_for_nothing(pool, legacy):
  _, params, apply = _tower(pool, legacy)
  real = np.arange(LENGTH) < LENGTHS[:, None]
  other = np.where(real, _text(), _text(1))
  assert (other != _text()).any()
  pooled, tokens = apply({"params": params}, _text(), LENGTHS)
  pooled_2, tokens_2 = apply({"params": params}, other, LENGTHS)
  np.testing.assert_array_equal(tokens[real], tokens_2[real])
  same = (pooled == pooled_2).all(axis=1)
  # open_clip's mask lets [CLS] see the first pad: only a full row is safe.
  np.testing.assert_array_equal(same, LENGTHS == LENGTH if legacy else True)


@pytest.mark.parametrize("pool", ["cls", "eot"])
def test_the_length_of_the_padding_counts_for_nothing(pool):
  _, params, apply = _tower(pool, False)
  short = _text()[1:, :5], LENGTHS[1:]
  pooled, tokens = apply({"params": params}, *short)
  expected = apply({"params": params}, _text()[1:], LENGTHS[1:])
  np.testing.assert_allclose(pooled, expected[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(tokens, expected[1][:, :5], rtol=1e-5, atol=1e-6)


def test_nothing_comes_from_the_future():
  """Neither from later tokens, nor from [CLS], which comes last."""
  tower, params, _ = _tower("cls", False)
  text = _text()[:1]

  def gradient(row):
    def pick(table, cls):
      # Every token of the caption has an embedding of its own.
      replaced = params | {"embedding": {"embedding": table}, "cls": cls}
      ids = np.arange(LENGTH, dtype=np.int32)[None]
      _, tokens = tower.apply({"params": replaced}, ids, LENGTHS[:1])
      return jnp.sum(jnp.sum(tokens, axis=(0, 2)) * jax.nn.one_hot(row, LENGTH))

    table = params["embedding"]["embedding"]
    table = jnp.concatenate([table[text[0]], table[LENGTH:]])
    return jax.grad(pick, (0, 1))(table, params["cls"])

  tokens, cls = toys.jit(jax.vmap(gradient))(np.arange(LENGTH))
  size = np.abs(tokens).max(axis=2)[:, :LENGTH]
  assert (size[np.triu_indices(LENGTH, 1)] == 0).all()
  assert (size[np.tril_indices(LENGTH)] > 1e-4).all()
  assert (cls == 0).all()


def test_the_eot_vector_is_that_of_the_last_token():
  _, params, apply = _tower("eot", False)
  pooled, tokens = apply({"params": params}, _text(), LENGTHS)
  rows = np.arange(len(LENGTHS))
  np.testing.assert_array_equal(pooled, tokens[rows, LENGTHS - 1])
  # A row that is padding of the batch has length 0, and must not be NaN.
  pooled, _ = apply({"params": params}, _text(), 0 * LENGTHS)
  np.testing.assert_array_equal(pooled, tokens[:, 0])


@functools.cache
def _bidirectional():
  stack = Transformer(D, 2, 2, mlp_ratio=2.0, post_norm=True)
  tower = BidirectionalText(11, LENGTH, stack)
  init = functools.partial(tower.init, jax.random.key(0))
  params = toys.random_like(jax.eval_shape(init, _text(), LENGTHS)["params"])
  run = toys.jit(lambda *args: tower.apply({"params": params}, *args))
  return params, run


def test_bidirectional_numpy():
  """Real tokens have positions 2, 3, ..., pads have position 1."""
  params, run = _bidirectional()
  assert params["pos"].shape == (2 + LENGTH, D)
  out = run(_text(), LENGTHS)
  for i, length in enumerate(LENGTHS):
    places = np.ones(LENGTH, int)
    places[:length] = 2 + np.arange(length)
    x = params["embedding"]["embedding"][_text()[i]] + params["pos"][places]
    x = reference.layer_norm(params["norm"], x + params["type"])
    mask = (np.arange(LENGTH) < length)[None]
    for layer in range(2):
      p = reference.pick(params["transformer"]["layers"], layer)
      x = reference.post_norm_block(p, x, mask, None, None, 1e-5)
    # Pads as well: that is how their position is seen.
    np.testing.assert_allclose(out[i], x, rtol=1e-4, atol=1e-5)


def test_bidirectional_padding_is_truncation():
  _, run = _bidirectional()
  out = run(_text(), LENGTHS)
  for i, length in enumerate(LENGTHS):
    short = run(_text()[i : i + 1, :length], LENGTHS[i : i + 1])
    np.testing.assert_allclose(short[0], out[i, :length], rtol=1e-5, atol=1e-5)
  other = np.where(np.arange(LENGTH) < LENGTHS[:, None], _text(), 3)
  real = np.arange(LENGTH) < LENGTHS[:, None]
  np.testing.assert_array_equal(run(other, LENGTHS)[real], out[real])
