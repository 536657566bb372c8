"""Updates that are skipped; non-finite ones are in test_optim."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax import skips
from vlp_jax.errors import UserError


def _norms(values, limit):
  """Feeds gradients of given norms; returns what was applied, and the state."""
  optimizer = skips.skip_nonfinite(optax.sgd(1.0), limit)
  params = {"w": jnp.zeros(2)}
  state, applied = optimizer.init(params), []
  for value in values:
    gradients = {"w": jnp.array([0.6, 0.8]) * value}
    updates, state = optimizer.update(gradients, state, params)
    norm = float(jnp.linalg.norm(updates["w"]))
    assert norm == 0 or norm == pytest.approx(value, rel=1e-6)
    assert bool(skips.last_finite(state)) == (norm > 0)
    applied.append(norm > 0)
  return applied, state


def test_spikes_are_skipped():
  values = [8.0, 4.0, 25.0, 2.0, np.nan, 30.0, 5.0]
  # Means before each: -, 8, 6, 8 (18 for 25), 6.5 twice, 9.1 (19.5 for 30).
  applied, state = _norms(values, 3.0)
  assert applied == [True, True, False, True, False, False, True]
  assert skips.skipped(state) == 3
  mean = np.mean([8, 4, 18, 2, 3 * 8, 5])
  np.testing.assert_allclose(state.norms.mean, mean, rtol=1e-6)
  assert state.norms.count == 6
  applied, state = _norms(values, 0.0)
  assert applied == [True] * 4 + [False] + [True] * 2
  assert state.norms is None


def test_norms_that_stay_high_are_followed():
  applied, _ = _norms([1.0] * 200 + [10.0] * 40, 4.0)
  assert not any(applied[200:220]) and all(applied[-5:])


def test_too_many_in_a_row_stop_a_run():
  def saved(*steps):
    return lambda before: max((s for s in steps if s < before), default=None)

  # Step 12's gradients are those of the parameters that step 11 has left.
  in_row = skips.SkippedInRow(3, 2, saved(4, 8, 11))
  assert not in_row.is_open
  for step, skipped in ((9, 3), (10, 4), (11, 4), (12, 5), (13, 6)):
    in_row.update(step, skipped)
    assert in_row.is_open == (step != 11)
  with pytest.raises(UserError) as error:
    in_row.update(14, 7)
  text = str(error.value)
  assert text.startswith("stopped at step 14: from step 12 on")
  assert "the last good checkpoint is of step 8;" in text
  in_row = skips.SkippedInRow(1, 0, saved(4))
  with pytest.raises(UserError, match="the only checkpoint, of step 4, has"):
    in_row.update(5, 1)
  in_row = skips.SkippedInRow(1, 0, saved())
  with pytest.raises(UserError, match="there is no checkpoint;"):
    in_row.update(1, 1)
  in_row = skips.SkippedInRow(0, 0, saved())
  for step in range(1, 100):
    in_row.update(step, step)
