"""Greedy decoding in one jitted loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlp_jax.ops.attention import MASKED


def greedy(
  step: Callable,
  cache,
  batch_size: int,
  max_len: int,
  *,
  bos_id: int,
  eos_id: int,
) -> jax.Array:
  """Decodes the most likely next token until every caption has ended.

  Args:
    step: `(cache, token int32 [B], t int32) -> (logits [B, V], cache)`.
    cache: what `step` starts from; a pytree of arrays.
    batch_size: B.
    max_len: number of tokens L, start symbol included.
    bos_id: the start symbol; never chosen.
    eos_id: the end symbol; what follows it is 0.

  Returns:
    int32 `[B, max_len]`. A caption that does not end by itself is cut, and
    its last token is `eos_id`.
  """
  ids = jnp.zeros((batch_size, max_len), jnp.int32).at[:, 0].set(bos_id)
  done = jnp.zeros((batch_size,), bool)

  def unfinished(carry):
    t, done, _, _ = carry
    return (t < max_len - 1) & ~jnp.all(done)

  def extend(carry):
    t, done, ids, cache = carry
    logits, cache = step(cache, ids[:, t], t)
    logits = logits.at[:, bos_id].set(MASKED)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(t == max_len - 2, eos_id, token)
    token = jnp.where(done, 0, token)
    return t + 1, done | (token == eos_id), ids.at[:, t + 1].set(token), cache

  return jax.lax.while_loop(unfinished, extend, (0, done, ids, cache))[2]
