"""Blockwise masks of patches, and hidden words."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from vlp_jax import sharding
from vlp_jax.ops import block_mask, layout, token_mask

COUNT = 20_000


def test_block_masks_have_the_release_s_statistics():
  """20,000 draws there: mean 74.35, 63 % exactly 75; .56 centre, .02 corner."""
  draw = jax.jit(
    lambda key: block_mask.draw(key, jnp.arange(COUNT), (16, 16), 75, 16)
  )
  masks = np.asarray(draw(jax.random.key(0)))
  sizes = masks.sum(axis=1)
  # Standard errors of the two estimates together: 0.02 and 0.005.
  assert abs(sizes.mean() - 74.35) < 0.05
  assert abs((sizes == 75).mean() - 0.63) < 0.015
  assert sizes.max() == 75 and sizes.min() > 55
  shares = masks.mean(axis=0).reshape(16, 16)
  assert abs(shares[7:9, 7:9].mean() - 0.56) < 0.01
  assert abs(shares[[0, 0, -1, -1], [0, -1, 0, -1]].mean() - 0.02) < 0.01


def test_a_mask_depends_on_its_example_alone():
  key = jax.random.key(1)
  draw = jax.jit(block_mask.draw, static_argnums=(2, 3, 4))
  many = draw(key, jnp.arange(8), (6, 6), 10, 4)
  one = draw(key, jnp.array([5]), (6, 6), 10, 4)
  np.testing.assert_array_equal(many[5], one[0])
  assert len({row.tobytes() for row in np.asarray(many)}) == 8


def test_devices_do_not_wait_for_each_other_s_masks():
  mesh = sharding.make_mesh((2, 4, 1), jax.devices()[:8])
  rows = NamedSharding(mesh, sharding.BATCH)
  index = jax.device_put(jnp.arange(16), rows)

  def compiled(context):
    def draw(index):  # a new one: jit remembers what it has traced
      return block_mask.draw(jax.random.key(1), index, (6, 6), 10, 4)

    with context:
      return jax.jit(draw).lower(index).compile()

  together = compiled(contextlib.nullcontext())
  apart = compiled(layout.batch(rows))
  assert "all-reduce" in together.as_text()  # else nothing is to be avoided
  assert not re.search("all-reduce|all-gather|permute", apart.as_text())
  np.testing.assert_array_equal(apart(index), together(index))


def test_places():
  mask = np.array([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]], bool)
  places, weights = block_mask.places(mask, 3)
  np.testing.assert_array_equal(places[0], [1, 3, 4])
  np.testing.assert_array_equal(weights, [[1, 1, 1], [1, 0, 0]])
  assert places[1, 0] == 0


def test_hidden_words():
  length, vocab, mask_id = 12, 50, 3
  text = np.random.default_rng(0).integers(5, vocab, (COUNT, length))
  text_len = np.random.default_rng(1).integers(1, length + 1, COUNT)
  text[np.arange(length) >= text_len[:, None]] = 0
  words = jax.jit(
    lambda key: token_mask.draw(
      key,
      jnp.arange(COUNT),
      jnp.asarray(text, jnp.int32),
      jnp.asarray(text_len, jnp.int32),
      ratio=0.15,
      mask_id=mask_id,
      vocab_size=vocab,
      count=8,
    )
  )(jax.random.key(0))
  changed = np.asarray(words.text) != text
  real = np.arange(length) < text_len[:, None]
  assert not changed[~real].any() and not changed[:, 0].any()
  weights = np.asarray(words.weights).astype(bool)
  rows, columns = np.nonzero(weights)
  at = np.asarray(words.places)[rows, columns]
  labels = np.asarray(words.labels)[rows, columns]
  np.testing.assert_array_equal(labels, text[rows, at])
  assert not changed.sum() > weights.sum()  # what changes is to be predicted
  chosen = np.zeros_like(changed)
  chosen[rows, at] = True
  assert not (changed & ~chosen).any()
  eligible = real[:, 1:].sum()
  assert abs(len(rows) / eligible - 0.15) < 0.003
  read = np.asarray(words.text)[rows, at]
  assert abs((read == mask_id).mean() - 0.802) < 0.01  # some draws are it
  assert abs((read == labels).mean() - 0.102) < 0.008


def test_words_past_the_count_are_left_alone():
  text = np.arange(8)[None]
  chosen = np.arange(8)[None] % 2 == 1
  words = token_mask.gather(text * 0, text, chosen, 3)
  np.testing.assert_array_equal(words.places, [[1, 3, 5]])
  np.testing.assert_array_equal(words.labels, [[1, 3, 5]])
  np.testing.assert_array_equal(words.weights, [[1, 1, 1]])
