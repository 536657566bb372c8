"""Training on several data sets at once, in fixed proportions.

`data.mix` names them and their weights, as a JSON object:

  {"cc12m": 0.7, "photos/pairs.jsonl": 0.3}

Which data set is next is not drawn but laid down in a table, in which every
data set comes as evenly as can be: of the first n examples, for any n, each
has its share of n, rounded up or down. Place k of the endless order is one
look at the table, so that a run can start at any step. (Grain's `mix` also has
random access, but rounds 0.7 and 0.3 to 233 and 100, and strays further from
the shares the more data sets there are.)

Each data set goes through epochs of its own, each in an order of its own.
"""

from __future__ import annotations

import fractions
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from ml_collections import ConfigDict

from vlp_jax import factors
from vlp_jax.data.sources import Record, Source, open_source

# The longest table. Weights that need a longer one are rounded to so many
# parts, at least one each.
_MAX_PARTS = 10_000


class Mixture(Source):
  """Several data sets as one: their records, one data set after the other.

  Records of different data sets have different `image_id`s: with m of them,
  and f the next odd number from m on, record x of the c-th is x f + c, modulo
  2^31. That is exact for ids below 2^31 / f; larger ones fall as hashes would.
  """

  def __init__(
    self, sources: Sequence[Source], weights: Sequence[float], split: str
  ):
    """Mixes sources.

    Args:
      sources: at least one.
      weights: positive; their sum need not be 1.
      split: their name of it.
    """
    self._sources = list(sources)
    self._ends = np.cumsum([len(source) for source in sources])
    self._parts = _whole(weights)
    self._factor = len(sources) | 1
    shares = [
      f"{part}/{sum(self._parts)} {source.name}"
      for part, source in zip(self._parts, sources, strict=True)
    ]
    self.name = " + ".join(shares)
    self.split = split
    self.directory = sources[0].directory
    self.fingerprint = " + ".join(
      f"{part} x {source.fingerprint}"
      for part, source in zip(self._parts, sources, strict=True)
    )

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Record:
    component, at = self._locate(index)
    return self._own(component, self._sources[component][at])

  def pair(self, index: int) -> Record:
    component, at = self._locate(index)
    return self._own(component, self._sources[component].pair(at))

  def describe(self, index: int) -> str:
    component, at = self._locate(index)
    return self._sources[component].describe(at)

  def captions(self) -> Iterator[str]:
    for source in self._sources:
      yield from source.captions()

  def order(self, seed: int) -> grain.MapDataset:
    seeds = np.random.SeedSequence(seed).generate_state(len(self._sources))
    orders = [
      source.order(int(state))
      for source, state in zip(self._sources, seeds, strict=True)
    ]
    starts = [self._peers(component).start for component in range(len(orders))]
    return _Mixed(orders, starts, table(self._parts))

  def peers(self, index: int) -> range:
    """Those of the same data set, so that the proportions stay."""
    return self._peers(self._locate(index)[0])

  def _peers(self, component: int) -> range:
    end = int(self._ends[component])
    return range(end - len(self._sources[component]), end)

  def _locate(self, index: int) -> tuple[int, int]:
    """Returns which data set record `index` is of, and its number there."""
    component = int(np.searchsorted(self._ends, index, side="right"))
    return component, index - self._peers(component).start

  def _own(self, component: int, record: Record) -> Record:
    image_id = (record["image_id"] * self._factor + component) % 2**31
    return record | {"image_id": image_id}


class _Mixed(grain.MapDataset):
  """Endless orders of records, mixed by a table without end."""

  def __init__(
    self,
    orders: Sequence[grain.MapDataset],
    starts: Sequence[int],
    picks: np.ndarray,
  ):
    """Makes the data set.

    Args:
      orders: indices of each data set's records.
      starts: added to these.
      picks: `[T]`, whose turn it is; see `table`.
    """
    super().__init__(orders)
    self._starts = starts
    self._picks = picks
    turns = picks[:, None] == np.arange(len(orders))
    self._totals = turns.sum(0)
    self._ranks = (turns.cumsum(0) - 1)[np.arange(len(picks)), picks]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    rounds, at = divmod(index, len(self._picks))
    component = self._picks[at]
    place = rounds * int(self._totals[component]) + int(self._ranks[at])
    return self._starts[component] + self._parents[component][place]


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


def open_training(data: ConfigDict) -> Source:
  """Opens what `config.data` trains on: `data.mix`, or its one data set.

  Raises:
    UserError: if the mix is not as it should be, or as `open_source`.
  """
  if not data.mix:
    return open_source(data, data.train_split)
  weights = factors.parse("data.mix", data.mix, _EXAMPLE)
  sources = []
  for name in weights:
    part = data.copy_and_resolve_references()
    is_list = name.endswith(".jsonl") or Path(name, "metadata.jsonl").is_file()
    part.source, part.name = (name, "") if is_list else ("", name)
    sources.append(open_source(part, data.train_split))
  return Mixture(sources, list(weights.values()), data.train_split)


_EXAMPLE = '{"cc12m": 0.7, "photos/pairs.jsonl": 0.3}'


def _whole(weights: Sequence[float]) -> list[int]:
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
