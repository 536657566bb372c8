"""Updates that are skipped: what would do harm, and when to give up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlp_jax.errors import UserError

# Updates that the mean of norms reaches back to.
_MEMORY = 100


class Norms(NamedTuple):
  """The running mean of gradients' norms.

  Attributes:
    count: int32 scalar, finite norms so far.
    mean: float32 scalar.
  """

  count: jax.Array
  mean: jax.Array


class SkipState(NamedTuple):
  """State of `skip_nonfinite`.

  Attributes:
    last_finite: bool scalar, whether the last update was applied.
    skipped: int32 scalar, how many were not, since the start.
    inner: the wrapped optimizer's state.
    norms: None where no update is skipped for its size.
  """

  last_finite: jax.Array
  skipped: jax.Array
  inner: Any
  norms: Norms | None = None


def skip_nonfinite(
  inner: optax.GradientTransformation, max_spike: float = 0.0
) -> optax.GradientTransformation:
  """Makes an update of zero, and keeps the state, where gradients overflow.

  Unlike `optax.apply_if_finite` it never gives in, however many come in a
  row; and a gradient whose norm overflows is refused as well, since its
  square would stay in Adam's second moment. Values are selected, not branched
  on: as fast, less memory, and no device waits for another inside a branch.

  Args:
    inner: the optimizer.
    max_spike: refuse a gradient, too, whose norm is over so many times the
      mean of the last hundred or so; 0 refuses none. The mean takes what is
      over the limit as if it were at it: it follows norms that stay high.
  """

  def init(params):
    norms = Norms(jnp.int32(0), jnp.float32(0)) if max_spike else None
    return SkipState(jnp.array(True), jnp.int32(0), inner.init(params), norms)

  def update(gradients, state, params=None):
    norm = optax.tree.norm(gradients)
    finite, norms = jnp.isfinite(norm), state.norms
    if max_spike:
      limit = jnp.where(norms.mean > 0, max_spike * norms.mean, jnp.inf)
      norms = _follow(norms, jnp.minimum(norm, limit), finite)
      finite &= norm <= limit
    updates, new = inner.update(gradients, state.inner, params)
    updates = jax.tree.map(
      lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates
    )
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.inner)
    skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
    return updates, SkipState(finite, skipped, kept, norms)

  return optax.GradientTransformation(init, update)


def _follow(norms: Norms, norm: jax.Array, finite: jax.Array) -> Norms:
  """Moves the mean towards a norm: the plain mean at first, then its tail."""
  count = norms.count + finite.astype(jnp.int32)
  step = (norm - norms.mean) / jnp.clip(count, 1, _MEMORY)
  return Norms(count, norms.mean + jnp.where(finite, step, 0))


def last_finite(opt_state: SkipState) -> jax.Array:
  """Returns a bool scalar: whether the last update was applied."""
  return opt_state.last_finite


def skipped(opt_state: SkipState) -> jax.Array:
  """Returns an int32 scalar: the updates skipped since the start."""
  return opt_state.skipped


class SkippedInRow:
  """Stops a run whose updates are all skipped.

  Args:
    limit: updates in a row that stop it; 0 lets it go on.
    skipped: updates that were skipped before.
    saved: returns the last step before a number that has a checkpoint, if there
      is one.
  """

  def __init__(
    self, limit: int, skipped: int, saved: Callable[[float], int | None]
  ):
    self._limit = limit
    self._skipped = skipped
    self._saved = saved
    self._first = None  # step of the first in a row

  @property
  def is_open(self) -> bool:
    """Whether the last update that `update` was told of was skipped."""
    return self._first is not None

  def update(self, step: int, skipped: float) -> None:
    """Looks at a finished step.

    Args:
      step: its number.
      skipped: updates that were skipped until then.

    Raises:
      UserError: if there were too many in a row.
    """
    if skipped == self._skipped:
      self._first = None
      return
    self._skipped = skipped
    self._first = step if self._first is None else self._first
    if self._limit and step - self._first + 1 >= self._limit:
      raise UserError(
        f"stopped at step {step}: from step {self._first} on all gradients "
        "were not finite or over config.optimizer.max_spike; "
        f"{self._checkpoint(self._first)}; with another --workdir, try a "
        "smaller config.optimizer.learning_rate, another config.seed or other "
        "data"
      )

  def _checkpoint(self, first: int) -> str:
    """Says which checkpoint is from before the parameters of a first step."""
    good, last = self._saved(first - 1), self._saved(math.inf)
    if good is not None:
      return f"the last good checkpoint is of step {good}"
    if last is not None:
      return f"the only checkpoint, of step {last}, has the same parameters"
    return "there is no checkpoint"
