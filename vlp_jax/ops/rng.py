"""Random streams: a key is a function of (base key, step, stream, example).

Nothing is split and carried: the base key in the train state never advances,
so a resumed run draws what an uninterrupted one would have drawn.
"""

import jax

# A fixed table: numbers are part of what makes a run repeatable, never reuse.
STREAMS = {"dropout": 0, "patch_mask": 1, "token_mask": 2, "negatives": 3}


def streams(key: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
  """Returns one key a stream for a step.

  Args:
    key: the base key of the run (threefry).
    step: int32 scalar.
  """
  at_step = jax.random.fold_in(key, step)
  return {
    name: jax.random.fold_in(at_step, number)
    for name, number in STREAMS.items()
  }


def per_example(key: jax.Array, index: jax.Array) -> jax.Array:
  """Returns one key an example, `[B]` keys.

  What is drawn from them does not depend on chunks, shards or hosts.

  Args:
    key: the key of a stream at a step.
    index: int32 `[B]`, the examples' places in the global batch.
  """
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
