"""Turns in fixed shares, as evenly as can be, without end.

Whose turn is next is not drawn but laid down in a table: of the first n turns,
for any n, each has its share of n, rounded up or down. Turn n is one look at
the table, so that a run can start at any step. (Grain's `mix` also has random
access, but rounds 0.7 and 0.3 to 233 and 100, and strays further from the
shares the more there are.)
"""

from __future__ import annotations

import fractions
import math
from collections.abc import Sequence

import numpy as np

# The longest table. Weights that need a longer one are rounded to so many
# parts, at least one each.
_MAX_PARTS = 10_000


class Turns:
  """Says whose turn it is.

  Attributes:
    parts: the shares as the least whole numbers.
  """

  def __init__(self, weights: Sequence[float]):
    """Lays down the table.

    Args:
      weights: positive; their sum need not be 1.
    """
    self.parts = whole(weights)
    self._picks = table(self.parts)
    turns = self._picks[:, None] == np.arange(len(self.parts))
    self._totals = turns.sum(0)
    self._before = turns.cumsum(0) - turns

  def __call__(self, n: int) -> tuple[int, int]:
    """Returns whose turn number n is, and how many that one had before."""
    rounds, at = divmod(n, len(self._picks))
    who = int(self._picks[at])
    before = rounds * int(self._totals[who]) + int(self._before[at, who])
    return who, before

  def before(self, n: int) -> list[int]:
    """Returns how many of the first n turns each has."""
    rounds, at = divmod(n, len(self._picks))
    return (rounds * self._totals + self._before[at]).tolist()


def table(parts: Sequence[int]) -> np.ndarray:
  """Spreads turns evenly.

  It is the quota method of Balinski and Young (1975), as a schedule: turn j of
  `p` in every `T` may come no sooner than its share of the turns exceeds j,
  and is due when it reaches j + 1; of those that may, the one due first comes.

  Args:
    parts: turns of each data set; T is their sum.

  Returns:
    `[T]`, whose turn it is. Among the first n entries (of the table's endless
    repetition) each has its share of n, rounded up or down.
  """
  total, done = sum(parts), [0] * len(parts)
  picks = np.empty(total, np.int32)
  for n in range(total):
    ready = [i for i, p in enumerate(parts) if done[i] * total < (n + 1) * p]
    # -(-a // b) rounds a / b up: the last n by which it must have come.
    pick = min(ready, key=lambda i: -(-(done[i] + 1) * total // parts[i]))
    done[pick] += 1
    picks[n] = pick
  return picks


def whole(weights: Sequence[float]) -> list[int]:
  """Returns the least whole numbers in the proportions of weights."""
  exact = [fractions.Fraction(str(weight)) for weight in weights]
  shares = [weight / sum(exact) for weight in exact]
  parts = math.lcm(*(share.denominator for share in shares))
  if parts > _MAX_PARTS:
    whole = [max(1, round(share * _MAX_PARTS)) for share in shares]
  else:
    whole = [int(share * parts) for share in shares]
  divisor = math.gcd(*whole)
  return [number // divisor for number in whole]
