"""Keywords of a caption as labels of its picture, float32.

Khan et al. 2022 (SIMLA, arXiv 2203.14395), section 2.4 and appendix A3: the
words that the teacher's [CLS] looks at, once it has seen the picture.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vlp_jax.ops import masks

PER_HEAD = 4  # "k = 4", appendix A3


def votes(attention: jax.Array, eligible: jax.Array | None) -> jax.Array:
  """Lets each head vote for the positions that it attends to most.

  Args:
    attention: `[B, heads, L]`, the probabilities of [CLS].
    eligible: bool `[B, L]`; None lets every position be voted for.

  Returns:
    int32 `[B, L]`: votes, 4 a head (fewer where fewer are eligible).
  """
  length = attention.shape[-1]
  if eligible is not None:
    attention = jnp.where(eligible[:, None], attention, -1.0)
  # As argsort: ties go to the position that comes first.
  order = jnp.argsort(-attention, axis=-1, stable=True)[..., :PER_HEAD]
  chosen = jnp.any(order[..., None] == jnp.arange(length), axis=-2)
  if eligible is not None:
    chosen &= eligible[:, None]
  return jnp.sum(chosen, axis=1, dtype=jnp.int32)


def eligible(
  text: jax.Array, text_len: jax.Array, stop_ids: Sequence[int]
) -> jax.Array:
  """Says which words may be keywords: real ones, neither first nor stopped.

  Args:
    text: int32 `[B, L]`; the first token is a special one.
    text_len: int32 `[B]`.
    stop_ids: ids that are never keywords.

  Returns:
    bool `[B, L]`.
  """
  found = masks.valid(text_len, text.shape[1]) & (jnp.arange(text.shape[1]) > 0)
  for stop_id in stop_ids:
    found &= text != stop_id
  return found


def choose(counts: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
  """Takes the positions with most votes.

  Args:
    counts: int32 `[B, L]` of `votes`.
    number: of positions, k.

  Returns:
    int32 `[B, k]`, and bool `[B, k]`: whether the position has any vote. (The
    release takes positions without one where there are too few others, in
    whatever order its sort leaves them.)
  """
  order = jnp.argsort(-counts, axis=-1, stable=True)[:, :number]
  return order.astype(jnp.int32), jnp.take_along_axis(counts, order, 1) > 0


def multi_hot(ids: jax.Array, counted: jax.Array, vocab_size: int):
  """Marks ids int32 `[B, k]` where `counted`: float32 `[B, vocab_size]`."""
  rows = jnp.arange(len(ids))[:, None]
  empty = jnp.zeros((len(ids), vocab_size), jnp.float32)
  return empty.at[rows, ids].max(counted.astype(jnp.float32))


def keyword_loss(
  logits: jax.Array,
  labels: jax.Array,
  teacher_logits: jax.Array,
  alpha: jax.Array,
) -> jax.Array:
  """Binary cross-entropy to labels and to a teacher, mean over words.

  Args:
    logits: `[B, V]`.
    labels: `[B, V]` in [0, 1].
    teacher_logits: `[B, V]`; no gradient.
    alpha: scalar, the teacher's weight.

  Returns:
    `[B]`.
  """
  soft = jax.lax.stop_gradient(jax.nn.sigmoid(teacher_logits))
  targets = (1 - alpha) * labels + alpha * soft  # the loss is linear in them
  return jnp.mean(jax.nn.softplus(logits) - targets * logits, axis=-1)
