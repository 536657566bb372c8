"""Hidden words for masked language modelling (Devlin et al. 2019)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.ops import masks, rng


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
    word = jax.random.randint(
      jax.random.fold_in(key, 1), (length,), 0, vocab_size, row.dtype
    )
    hidden = jnp.where(u[1] < 0.8, mask_id, jnp.where(u[1] < 0.9, word, row))
    return jnp.where(chosen, hidden, row), chosen

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
