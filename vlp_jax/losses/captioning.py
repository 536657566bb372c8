"""Next-token cross-entropy, float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def targets(
  text: jax.Array, text_len: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns each token's successor and its weight.

  Args:
    text: int32 `[B, L]`.
    text_len: int32 `[B]`.

  Returns:
    Labels int32 `[B, L - 1]`; weights float32 `[B, L - 1]`, 1 where the label
    is a real token and 0 where it is padding.
  """
  weights = jnp.arange(1, text.shape[1]) < text_len[:, None]
  return text[:, 1:], weights.astype(jnp.float32)


def cross_entropy(
  head: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  labels: jax.Array,
  chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of every token (CoCa equation 3).

  Args:
    head: maps hidden `[..., D]` to float32 logits `[..., V]`.
    hidden: `[B, T, D]`.
    labels: int32 `[B, T]`.
    chunk: positions whose logits exist at a time, in the forward and in the
      backward pass; 0 is all. The results are the same.

  Returns:
    The negative log-likelihood float32 `[B, T]`, and whether the label is the
    most likely token, bool `[B, T]`.
  """

  def score(hidden, labels):
    logits = head(hidden)
    label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - label
    return nll, jnp.argmax(logits, axis=-1) == labels

  if not chunk:
    return score(hidden, labels)
  b, t, d = hidden.shape
  pad = -t % chunk
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  labels = jnp.pad(labels, ((0, 0), (0, pad)))
  parts = (
    hidden.reshape(b, -1, chunk, d).swapaxes(0, 1),
    labels.reshape(b, -1, chunk).swapaxes(0, 1),
  )
  parts = jax.lax.map(jax.checkpoint(lambda part: score(*part)), parts)
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(b, t + pad)[:, :t], parts
  )
