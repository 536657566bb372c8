"""Contrastive losses over the pairs of a batch, float32."""

import jax
import jax.numpy as jnp

from vlp_jax.ops.attention import MASKED
from vlp_jax.ops.rows import ALL, Rows, map_rows

REDUCTIONS = ("mean", "sum")


def similarity(a: jax.Array, b: jax.Array) -> jax.Array:
  """Products of all rows, in float32 on every kind of device.

  Args:
    a: `[..., A, E]`.
    b: `[..., B, E]`.

  Returns:
    `[..., A, B]`.
  """
  return jnp.matmul(
    a, b.mT, precision="highest", preferred_element_type=jnp.float32
  )


def softmax(
  image: jax.Array,
  text: jax.Array,
  scale: jax.Array,
  image_id: jax.Array,
  reduction: str = "mean",
  rows: Rows = ALL,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """InfoNCE in both directions (Radford et al. 2021; CoCa equation 2).

  Captions of the same picture are neither positives nor negatives of it.

  Args:
    image: unit embeddings `[B, E]`.
    text: unit embeddings `[B, E]`.
    scale: scalar, the inverse temperature.
    image_id: int32 `[B]`.
    reduction: `mean` of the two directions (open_clip) or their `sum` (CoCa).
    rows: how many rows of logits exist at a time.

  Returns:
    The loss of each example `[B]`, and whether its own partner scores best
    (bool `[B]`) under `i2t` and `t2i`.

  Raises:
    ValueError: on another reduction.
  """
  if reduction not in REDUCTIONS:
    raise ValueError(f"reduction {reduction!r} is neither mean nor sum")

  def one_way(query, keys):
    def some(part):
      query, (ids, place) = part
      logits = scale * similarity(query, keys)
      compared, _ = _compared(ids, place, image_id)
      logits = jnp.where(compared, logits, MASKED)
      positive = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
      loss = jax.nn.logsumexp(logits, axis=1) - positive
      return loss, jnp.argmax(logits, axis=1) == place

    return map_rows(some, (query, _numbered(image_id)), rows)

  i2t, i2t_right = one_way(image, text)
  t2i, t2i_right = one_way(text, image)
  loss = (i2t + t2i) * (0.5 if reduction == "mean" else 1.0)
  return loss, {"i2t": i2t_right, "t2i": t2i_right}


def sigmoid(
  image: jax.Array,
  text: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  image_id: jax.Array,
  rows: Rows = ALL,
) -> jax.Array:
  """Every pair is a binary question (Zhai et al. 2023, algorithm 1).

  Args:
    image: unit embeddings `[B, E]`.
    text: unit embeddings `[B, E]`.
    scale: scalar, the inverse temperature.
    bias: scalar, added to the logits.
    image_id: int32 `[B]`; see `softmax`.
    rows: how many rows of logits exist at a time.

  Returns:
    The loss of each picture, summed over captions, `[B]`.
  """

  def some(part):
    image, (ids, place) = part
    logits = bias + scale * similarity(image, text)
    compared, positive = _compared(ids, place, image_id)
    loss = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
    return jnp.sum(loss, axis=1, where=compared)

  return map_rows(some, (image, _numbered(image_id)), rows)


def _numbered(image_id: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Ids with their places in the batch."""
  return image_id, jnp.arange(len(image_id))


def _compared(
  ids: jax.Array, place: jax.Array, image_id: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Which pairs a loss looks at, and which of these belong together.

  Args:
    ids: int32 `[b]`, of some rows.
    place: int32 `[b]`, their places in the batch.
    image_id: int32 `[B]`.

  Returns:
    Two masks, bool `[b, B]`.
  """
  positive = place[:, None] == jnp.arange(len(image_id))[None]
  return (ids[:, None] != image_id[None]) | positive, positive
