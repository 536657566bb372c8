"""Completion of tokens: contrast among the tokens of some pairs, float32.

Tu et al. 2023 (GLSCL, arXiv 2306.07096). Completion of whole pictures and texts
is `contrastive.softmax`.
"""

import jax
import jax.numpy as jnp

from vlp_jax.losses.contrastive import similarity
from vlp_jax.ops.attention import MASKED


def tokens(
  recovered: jax.Array,
  complete: jax.Array,
  weights: jax.Array,
  pair_id: jax.Array,
  temperature: float,
) -> jax.Array:
  """InfoNCE of tokens in both directions, summed.

  A token's negatives are the other tokens of its own pair, and those of pairs
  with another id.

  Args:
    recovered: unit vectors `[G, g, K, D]`: of G groups of g pairs, K tokens
      each.
    complete: the same tokens, given all of the pair; no gradient reaches them.
    weights: float `[G, g, K]`, 0 for places without a token.
    pair_id: int32 `[G, g]`.
    temperature: that cosines are divided by.

  Returns:
    The loss of each token, `[G, g K]`; without meaning where there is none.
  """
  groups, pairs, count, _ = recovered.shape
  rows = (groups, pairs * count)
  complete = jax.lax.stop_gradient(complete)
  a, b = (x.reshape(*rows, -1) for x in (recovered, complete))
  logits = similarity(a, b) / temperature
  pair = jnp.repeat(jnp.arange(pairs), count)
  ids = jnp.repeat(pair_id, count, axis=1)
  negative = (ids[:, :, None] != ids[:, None]) | (pair[:, None] == pair)
  real = weights.reshape(rows) > 0
  partner = jnp.eye(rows[1], dtype=bool)
  seen = (negative & real[:, :, None] & real[:, None]) | partner
  logits = jnp.where(seen, logits, MASKED)
  positive = jnp.diagonal(logits, axis1=1, axis2=2)
  return sum(jax.nn.logsumexp(logits, axis=a) - positive for a in (1, 2))
