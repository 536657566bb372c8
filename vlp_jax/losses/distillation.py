"""Losses whose targets a momentum teacher softens, float32.

Li et al. 2021 ("Align before fuse", arXiv 2107.07651), section 3.4: with a
weight alpha the teacher's distribution stands beside the annotated answer.
"""

import jax
import jax.numpy as jnp

from vlp_jax.ops.attention import MASKED


def contrastive(
  query: jax.Array,
  keys: jax.Array,
  teacher_query: jax.Array,
  temperature: jax.Array,
  alpha: jax.Array,
  allowed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One direction of momentum contrast (equations 1 and 6 there).

  Args:
    query: unit embeddings `[B, E]`.
    keys: the teacher's unit embeddings of the other modality `[B + Q, E]`,
      this batch's first; no gradient reaches them.
    teacher_query: the teacher's for `query`, `[B, E]`.
    temperature: scalar that similarities are divided by.
    alpha: scalar, the teacher's weight.
    allowed: bool `[B, B + Q]`, which keys are compared; the diagonal always.

  Returns:
    The loss of each query `[B]`, and whether its partner scores best.
  """
  keys = jax.lax.stop_gradient(keys)
  logits = _similarity(query, keys, allowed) / temperature
  teacher = _similarity(teacher_query, keys, allowed) / temperature
  partner = jnp.arange(len(query))
  soft = jax.lax.stop_gradient(jax.nn.softmax(teacher))
  log_p = jax.nn.log_softmax(logits)
  hard = -jnp.take_along_axis(log_p, partner[:, None], axis=1)[:, 0]
  # A key that is not compared has a target of zero, and log_p is finite.
  loss = (1 - alpha) * hard - alpha * jnp.sum(soft * log_p, axis=1)
  return loss, jnp.argmax(logits, axis=1) == partner


def _similarity(a: jax.Array, b: jax.Array, allowed: jax.Array) -> jax.Array:
  s = jnp.matmul(a, b.T, preferred_element_type=jnp.float32)
  return jnp.where(allowed, s, MASKED)


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  teacher_logits: jax.Array,
  alpha: jax.Array,
  *,
  axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy to labels and, with weight alpha, to a teacher.

  Args:
    logits: `[B, K, V]`.
    labels: int32 `[B, K]`.
    teacher_logits: `[B, K, V]`; no gradient.
    alpha: scalar.
    axis: that the student is normalised over for the teacher's part; 1 is
      what SIMLA's release does (it should be the last).

  Returns:
    The loss `[B, K]`, and whether the label has the highest logit.
  """
  log_p = jax.nn.log_softmax(logits)
  hard = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
  soft = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits))
  if axis != -1:
    log_p = jax.nn.log_softmax(logits, axis=axis)
  loss = (1 - alpha) * hard - alpha * jnp.sum(soft * log_p, axis=-1)
  return loss, jnp.argmax(logits, axis=-1) == labels
