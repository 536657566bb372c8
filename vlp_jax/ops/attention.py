"""Scaled dot-product attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Large enough to vanish in a softmax, finite so that a row with nothing to
# attend to (an empty caption) gives numbers and not NaN.
MASKED = -1e30

Through = Callable[[jax.Array], jax.Array]


def _unchanged(p_BNTS: jax.Array) -> jax.Array:
  return p_BNTS


def attend(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  mask_BTS: jax.Array | None = None,
  through: Through = _unchanged,
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


def attend_in_frames(
  q_BFTNH: jax.Array,
  k_BFTNH: jax.Array,
  v_BFTNH: jax.Array,
  through: Through = _unchanged,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Attends inside of frames, and from each frame's first token to them all.

  The first token of a frame attends to every token of every frame, the others
  to the tokens of their own frame, the first one included: no pair of patches
  of two frames is ever scored (Ji et al. 2023, SCL's flexible encoder).

  Args:
    q_BFTNH: queries of F frames of T tokens.
    k_BFTNH: keys.
    v_BFTNH: values.
    through: as for `attend`.

  Returns:
    The output `[B, F, T, N, H]`, and the probabilities of the first tokens
    `[B, N, F, F T]` and of the others `[B F, N, T - 1, T]`.
  """
  b, f = q_BFTNH.shape[:2]

  def merge(x, *leading):
    return x.reshape(*leading, *x.shape[-2:])

  first, p_first = attend(
    q_BFTNH[:, :, 0],
    *(merge(x, b, -1) for x in (k_BFTNH, v_BFTNH)),
    through=through,
  )
  size = q_BFTNH.shape[2]
  rest, p_rest = attend(
    merge(q_BFTNH[:, :, 1:], b * f, size - 1),
    *(merge(x, b * f, size) for x in (k_BFTNH, v_BFTNH)),
    through=through,
  )
  rest = merge(rest, b, f, size - 1)
  return jnp.concatenate([first[:, :, None], rest], 2), (p_first, p_rest)
