"""Random streams: functions of key, step, name and example."""

import jax
import numpy as np

from vlp_jax.ops import rng


def _bits(keys):
  return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


def test_streams_and_steps_differ_and_repeat():
  key = jax.random.key(0, impl="threefry2x32")
  keys = [
    rng.streams(key, np.int32(step))[name]
    for step in (0, 1, 2)
    for name in sorted(rng.STREAMS)
  ]
  bits = np.concatenate([_bits(k) for k in keys])
  assert len(np.unique(bits, axis=0)) == 3 * len(rng.STREAMS)
  again = rng.streams(key, np.int32(1))["patch_mask"]
  expected = jax.random.fold_in(jax.random.fold_in(key, 1), 1)
  np.testing.assert_array_equal(_bits(again), _bits(expected))


def test_the_table_of_streams_never_changes():
  """A number is part of what makes old runs repeatable: only add."""
  known = {"dropout": 0, "patch_mask": 1, "token_mask": 2, "negatives": 3}
  assert known.items() <= rng.STREAMS.items()
  assert len(set(rng.STREAMS.values())) == len(rng.STREAMS)


def test_an_example_has_its_own_key():
  key = jax.random.key(0, impl="threefry2x32")
  keys = rng.per_example(key, np.arange(5, dtype=np.int32))
  alone = rng.per_example(key, np.array([3], np.int32))
  np.testing.assert_array_equal(_bits(keys)[3], _bits(alone)[0])
  assert len(np.unique(_bits(keys), axis=0)) == 5
