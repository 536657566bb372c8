"""Hidden words for masked language modelling (Devlin et al. 2019)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.ops import masking, masks, rng


class HiddenWords(NamedTuple):
  """Captions with some words hidden.

  Attributes:
    text: int32 `[B, L]`, what the model reads.
    places: int32 `[B, K]`, where words are to be predicted.
    labels: int32 `[B, K]`, those words.
    weights: float32 `[B, K]`, 1 where the place counts.
  """

  text: jax.Array
  places: jax.Array
  labels: jax.Array
  weights: jax.Array


def draw(
  key: jax.Array,
  index: jax.Array,
  text: jax.Array,
  text_len: jax.Array,
  *,
  ratio: float,
  mask_id: int,
  vocab_size: int,
  count: int,
) -> HiddenWords:
  """Chooses words with a probability, each example from its own key.

  Of the chosen ones 80 % become [MASK], 10 % a random id of the whole
  vocabulary, and 10 % stay. The first token and padding are never chosen.

  Args:
    key: the key of a stream at a step.
    index: int32 `[B]`, the examples' places in the global batch.
    text: int32 `[B, L]`.
    text_len: int32 `[B]`.
    ratio: the probability.
    mask_id: of [MASK].
    vocab_size: V.
    count: K, the most that are predicted in a caption; the first ones are.
  """

  def one(key, row, eligible):
    length = len(row)
    u = jax.random.uniform(key, (2, length))
    chosen = eligible & (u[0] < ratio)
    return jnp.where(
      chosen, _hide(key, u[1], row, mask_id, vocab_size), row
    ), chosen

  eligible = masks.valid(text_len, text.shape[1])
  eligible &= jnp.arange(text.shape[1]) > 0
  keys = rng.per_example(key, index)
  masked, chosen = jax.vmap(one)(keys, text, eligible)
  return gather(masked, text, chosen, count)


def gather(
  masked: jax.Array, text: jax.Array, chosen: jax.Array, count: int
) -> HiddenWords:
  """Lists up to `count` chosen places of each row, the first ones first.

  Args:
    masked: int32 `[B, L]`, what the model reads.
    text: int32 `[B, L]`, what is true.
    chosen: bool `[B, L]`.
    count: K.
  """
  order = jnp.argsort(~chosen, axis=1, stable=True)[:, :count]
  return HiddenWords(
    text=masked,
    places=order.astype(jnp.int32),
    labels=jnp.take_along_axis(text, order, axis=1),
    weights=jnp.take_along_axis(chosen, order, axis=1).astype(jnp.float32),
  )


def _hide(key, u, row, mask_id, vocab_size):
  """What stands for each word of a row, given uniform numbers."""
  word = jax.random.randint(
    jax.random.fold_in(key, 1), row.shape, 0, vocab_size, row.dtype
  )
  return jnp.where(u < 0.8, mask_id, jnp.where(u < 0.9, word, row))


def corrupt(
  key: jax.Array,
  index: jax.Array,
  text: jax.Array,
  chosen: jax.Array,
  *,
  mask_id: int,
  vocab_size: int,
) -> jax.Array:
  """Of the chosen words, makes 80 % [MASK] and 10 % any id; 10 % stay.

  Args:
    key: the key of a stream at a step.
    index: int32 `[B]`, the examples' places in the global batch.
    text: int32 `[B, L]`.
    chosen: bool `[B, L]`.
    mask_id: of [MASK].
    vocab_size: V.
  """

  def one(key, row):
    u = jax.random.uniform(key, row.shape)
    return _hide(key, u, row, mask_id, vocab_size)

  hidden = jax.vmap(one)(rng.per_example(key, index), text)
  return jnp.where(chosen, hidden, text)


def choose(
  key: jax.Array, index: jax.Array, pool: jax.Array, number: jax.Array
) -> jax.Array:
  """Chooses so many places of a pool, each example from its own key.

  Args:
    key: the key of a stream at a step.
    index: int32 `[B]`, the examples' places in the global batch.
    pool: bool `[B, L]`, what may be chosen.
    number: int `[B]`; where the pool is smaller, all of it is chosen.

  Returns:
    bool `[B, L]`.
  """
  u = masking.random_scores(key, index, pool.shape[1])
  first = jnp.argsort(jnp.where(pool, u, 2.0), axis=1)
  return pool & (jnp.argsort(first, axis=1) < number[:, None])


def choose_again(
  key: jax.Array, index: jax.Array, pool: jax.Array, number: jax.Array
) -> jax.Array:
  """The same with replacement: a place may be drawn more than once.

  Args:
    key, index: as for `choose`.
    pool: bool `[B, L]`, in each row one run of places.
    number: int `[B]` of draws, L at most.
  """
  length = pool.shape[1]
  u = masking.random_scores(key, index, length)
  size = jnp.sum(pool, axis=1, keepdims=True)
  place = jnp.argmax(pool, axis=1)[:, None] + jnp.floor(u * size).astype(int)
  drawn = jnp.arange(length) < number[:, None]
  hit = (place[..., None] == jnp.arange(length)) & drawn[..., None]
  return pool & jnp.any(hit, axis=1)
