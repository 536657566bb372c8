"""Training on several data sets at once, in fixed proportions.

`data.mix` names them and their weights, as a JSON object:

  {"cc12m": 0.7, "photos/pairs.jsonl": 0.3}

Which data set is next, `turns.py` lays down: of the first n examples, for any
n, each data set has its share of n, rounded up or down.

Each data set goes through epochs of its own, each in an order of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from ml_collections import ConfigDict

from vlp_jax import factors
from vlp_jax.data.sources import Record, Source, open_source
from vlp_jax.data.turns import Turns


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
    self._turns = Turns(weights)
    parts = self._turns.parts
    self._factor = len(sources) | 1
    shares = [
      f"{part}/{sum(parts)} {source.name}"
      for part, source in zip(parts, sources, strict=True)
    ]
    self.name = " + ".join(shares)
    self.split = split
    self.directory = sources[0].directory
    self.fingerprint = " + ".join(
      f"{part} x {source.fingerprint}"
      for part, source in zip(parts, sources, strict=True)
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
    return _Mixed(orders, starts, self._turns)

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
  """Endless orders of records, in turn."""

  def __init__(
    self,
    orders: Sequence[grain.MapDataset],
    starts: Sequence[int],
    turns: Turns,
  ):
    """Makes the data set.

    Args:
      orders: indices of each data set's records.
      starts: added to these.
      turns: of the data sets.
    """
    super().__init__(orders)
    self._starts = starts
    self._turns = turns

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    component, place = self._turns(index)
    return self._starts[component] + self._parents[component][place]


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
