"""Image-text matching with hard negatives, float32.

Li et al. 2021 ("Align before fuse", arXiv 2107.07651), section 3.2.
"""

import jax
import jax.numpy as jnp

from vlp_jax.ops.attention import MASKED


def admissible(image_id: jax.Array, same_image: bool) -> jax.Array:
  """Says which pairs of a group may be negatives of which: never itself.

  Args:
    image_id: int32 `[G, g]`, of G groups of g pairs.
    same_image: whether pairs of the same picture are left out, too.

  Returns:
    bool `[G, g, g]`, symmetric.
  """
  if same_image:
    return image_id[:, :, None] != image_id[:, None]
  size = image_id.shape[1]
  return jnp.broadcast_to(~jnp.eye(size, dtype=bool), (*image_id.shape, size))


def hard_negatives(
  similarity: jax.Array, admissible: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Draws one negative a row, the more similar the more likely.

  A draw from softmax(similarity) over what is admissible, by the Gumbel-max
  trick: it cannot underflow, however small the temperature.

  Args:
    similarity: logits `[..., g, g]`, rows against columns; no gradient.
    admissible: bool `[..., g, g]`.
    noise: Gumbel `[..., g, g]`; zeros take the most similar.

  Returns:
    int32 `[..., g]`, a column for each row; and float32 `[..., g]`, 0 where
    no column is admissible, and 1 elsewhere.
  """
  scores = jax.lax.stop_gradient(similarity) + noise
  index = jnp.argmax(jnp.where(admissible, scores, MASKED), axis=-1)
  exists = jnp.any(admissible, axis=-1).astype(jnp.float32)
  return index.astype(jnp.int32), exists


def match_loss(logits: jax.Array, match: jax.Array) -> jax.Array:
  """Cross-entropy of (no match, match).

  Args:
    logits: `[..., 2]`.
    match: int32 `[...]`, 1 where text and picture belong together.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_p, match[..., None], axis=-1)[..., 0]
