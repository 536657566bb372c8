"""Random integers that are the same on every machine and numpy version.

numpy promises that `SeedSequence` and the raw stream of `PCG64` never change;
it does not promise that of `Generator`'s distributions (NEP 19). What must be
the same to the byte is therefore drawn from the raw stream, in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
  """Integer draws that are a pure function of a key of integers."""

  def __init__(self, *key: int):
    """Starts the stream of `key`, each in 0..2**32-1.

    Keys of one length that differ give unrelated streams.
    """
    entropy = np.array(key, np.uint32)  # a tuple of ints takes twice the time
    self._stream = np.random.PCG64(np.random.SeedSequence(entropy))

  def below(self, n: int) -> int:
    """Draws from 0..n-1; the bias, at most n / 2**32, is of no consequence."""
    return (self._stream.random_raw() >> 32) * n >> 32

  def between(self, low: int, high: int) -> int:
    """Draws from low..high, both included."""
    return low + self.below(high - low + 1)

  def pick(self, items: Sequence[T]) -> T:
    """Draws one of the items."""
    return items[self.below(len(items))]

  def chance(self, numerator: int, denominator: int) -> bool:
    """Is true with probability numerator / denominator."""
    return self.below(denominator) < numerator

  def shuffled(self, items: Sequence[T]) -> list[T]:
    """Returns the items in a random order (Fisher-Yates)."""
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
      j = self.below(i + 1)
      items[i], items[j] = items[j], items[i]
    return items

  def bytes(self, n: int) -> np.ndarray:
    """Draws n bytes, uint8 `[n]`."""
    words = self._stream.random_raw(-(-n // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:n]
