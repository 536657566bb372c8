"""Contrastive losses over the pairs of a batch, float32."""

import jax
import jax.numpy as jnp

from vlp_jax.ops.attention import MASKED

REDUCTIONS = ("mean", "sum")


def negatives(image_id: jax.Array) -> jax.Array:
  """Returns bool `[B, B]`: which pairs are negatives, given int32 `[B]`.

  Captions of the same picture are neither positives nor negatives of it; only
  the diagonal is positive.
  """
  return image_id[:, None] != image_id[None]


def softmax(
  image: jax.Array,
  text: jax.Array,
  scale: jax.Array,
  image_id: jax.Array,
  reduction: str = "mean",
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """InfoNCE in both directions (Radford et al. 2021; CoCa equation 2).

  Args:
    image: unit embeddings `[B, E]`.
    text: unit embeddings `[B, E]`.
    scale: scalar, the inverse temperature.
    image_id: int32 `[B]`; see `negatives`.
    reduction: `mean` of the two directions (open_clip) or their `sum` (CoCa).

  Returns:
    The loss of each example `[B]`, and whether its own partner scores best
    (bool `[B]`) under `i2t` and `t2i`.

  Raises:
    ValueError: on another reduction.
  """
  if reduction not in REDUCTIONS:
    raise ValueError(f"reduction {reduction!r} is neither mean nor sum")
  logits = scale * jnp.matmul(image, text.T, preferred_element_type=jnp.float32)
  diagonal = jnp.eye(len(image), dtype=bool)
  logits = jnp.where(negatives(image_id) | diagonal, logits, MASKED)
  positive = jnp.diagonal(logits)
  loss = sum(jax.nn.logsumexp(logits, axis=a) - positive for a in (0, 1))
  right = {
    name: jnp.argmax(logits, axis=axis) == jnp.arange(len(image))
    for name, axis in (("i2t", 1), ("t2i", 0))
  }
  return loss * (0.5 if reduction == "mean" else 1.0), right


def sigmoid(
  image: jax.Array,
  text: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  image_id: jax.Array,
) -> jax.Array:
  """Every pair is a binary question (Zhai et al. 2023, algorithm 1).

  Args:
    image: unit embeddings `[B, E]`.
    text: unit embeddings `[B, E]`.
    scale: scalar, the inverse temperature.
    bias: scalar, added to the logits.
    image_id: int32 `[B]`; see `negatives`.

  Returns:
    The loss of each picture, summed over captions, `[B]`.
  """
  logits = bias + scale * jnp.matmul(
    image, text.T, preferred_element_type=jnp.float32
  )
  positive = jnp.eye(len(image), dtype=bool)
  loss = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
  return jnp.sum(loss, axis=1, where=negatives(image_id) | positive)
