"""Scaled dot-product attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Large enough to vanish in a softmax, finite so that a row with nothing to
# attend to (an empty caption) gives numbers and not NaN.
MASKED = -1e30


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BTS: jax.Array | None = None,
  through: Callable[[jax.Array], jax.Array] = lambda p_BNTS: p_BNTS,
) -> tuple[jax.Array, jax.Array]:
  """Attends with scores and softmax in float32.

  Args:
    q_BTNH: queries; N heads of H channels.
    k_BSNH: keys.
    v_BSNH: values.
    mask_BTS: True = attend; broadcasts over B and T; None attends everywhere.
    through: what the probabilities go through (dropout, say) before they
      weigh the values.

  Returns:
    The output `[B, T, N, H]` in the dtype of `v`, and the probabilities
    `[B, N, T, S]` as the softmax made them, float32 (not computed twice, and
    free when unused).
  """
  scale = q_BTNH.shape[-1] ** -0.5
  s_BNTS = jnp.einsum(
    "BTNH,BSNH->BNTS",
    q_BTNH * scale,
    k_BSNH,
    preferred_element_type=jnp.float32,
  )
  if mask_BTS is not None:
    s_BNTS = jnp.where(mask_BTS[:, None], s_BNTS, MASKED)
  p_BNTS = jax.nn.softmax(s_BNTS, axis=-1)
  weights = through(p_BNTS).astype(v_BSNH.dtype)
  o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)
  return o_BTNH, p_BNTS
