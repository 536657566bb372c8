"""Losses whose targets a momentum teacher softens, float32.

Li et al. 2021 ("Align before fuse", arXiv 2107.07651), section 3.4: with a
weight alpha the teacher's distribution stands beside the annotated answer.
"""

import jax
import jax.numpy as jnp

from vlp_jax.losses.contrastive import similarity
from vlp_jax.ops.attention import MASKED
from vlp_jax.ops.rows import ALL, Rows, map_rows


def contrastive(
  query: jax.Array,
  keys: jax.Array,
  teacher_query: jax.Array,
  temperature: jax.Array,
  alpha: jax.Array,
  query_id: jax.Array,
  key_id: jax.Array,
  rows: Rows = ALL,
) -> tuple[jax.Array, jax.Array]:
  """One direction of momentum contrast (equations 1 and 6 there).

  Args:
    query: unit embeddings `[B, E]`.
    keys: the teacher's unit embeddings of the other modality `[B + Q, E]`,
      this batch's first; no gradient reaches them.
    teacher_query: the teacher's for `query`, `[B, E]`.
    temperature: scalar that similarities are divided by.
    alpha: scalar, the teacher's weight.
    query_id: int32 `[B]`; a query is compared with its partner, and with keys
      of other ids.
    key_id: int32 `[B + Q]`.
    rows: how many queries have logits at a time.

  Returns:
    The loss of each query `[B]`, and whether its partner scores best.
  """
  keys = jax.lax.stop_gradient(keys)

  def some(part):
    query, teacher_query, ids, place = part
    partner = place[:, None] == jnp.arange(len(keys))[None]
    compared = (ids[:, None] != key_id[None]) | partner

    def scores(x):
      return jnp.where(compared, similarity(x, keys), MASKED) / temperature

    logits = scores(query)
    soft = jax.lax.stop_gradient(jax.nn.softmax(scores(teacher_query)))
    log_p = jax.nn.log_softmax(logits)
    hard = -jnp.take_along_axis(log_p, place[:, None], axis=1)[:, 0]
    # A key that is not compared has a target of zero, and log_p is finite.
    loss = (1 - alpha) * hard - alpha * jnp.sum(soft * log_p, axis=1)
    return loss, jnp.argmax(logits, axis=1) == place

  places = jnp.arange(len(query))
  return map_rows(some, (query, teacher_query, query_id, places), rows)


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
