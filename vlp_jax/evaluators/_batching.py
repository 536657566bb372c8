"""Evaluation batches: padded to one size, laid over the mesh, unpadded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlp_jax.data import sources
from vlp_jax.methods.base import Method, Params

# Cosines closer than this are a tie. One caption encoded in two rows of two
# batches differs in the last bits, and those must not decide a rank.
TIE = 1e-6


class Subset(sources.Source):
  """A view of some records of a source, in the order given."""

  def __init__(self, source: sources.Source, indices: Sequence[int]):
    self._source = source
    self._indices = indices
    self.name = source.name

  @property
  def language(self) -> ModuleType | None:
    """That of the whole; no attribute, since modules cannot be pickled."""
    return self._source.language

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> sources.Record:
    return self._source[self._indices[index]]

  def pair(self, index: int) -> sources.Record:
    return self._source.pair(self._indices[index])

  def describe(self, index: int) -> str:
    return self._source.describe(self._indices[index])


def padded_size(batch_size: int, mesh: Mesh) -> int:
  """Rounds a batch size up to the devices that share a batch."""
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  return -(-batch_size // devices) * devices


def put(
  batch: dict[str, np.ndarray], mesh: Mesh, *, whole: bool = False
) -> dict[str, jax.Array]:
  """Lays arrays that every host holds over the mesh, by rows or `whole`."""
  sharding = NamedSharding(mesh, P() if whole else P(("data", "fsdp")))
  return {
    name: jax.make_array_from_callback(
      value.shape, sharding, lambda index, value=value: value[index]
    )
    for name, value in batch.items()
  }


def jit(function: Callable, mesh: Mesh) -> Callable:
  """Jits a function of rows so that every host can fetch what it returns.

  A single host fetches the rows from where they are. Gathering them first
  would put a collective into every evaluation, for nothing.
  """
  spec = P() if jax.process_count() > 1 else P(("data", "fsdp"))
  return jax.jit(function, out_shardings=NamedSharding(mesh, spec))


@functools.lru_cache(maxsize=128)
def compiled(method: Method, capability: str, mesh: Mesh, **static):
  """Jits `method.<capability>(params, batch, **static)`.

  One function for each method, capability and mesh, so that evaluators share
  what is compiled.
  """
  return jit(functools.partial(getattr(method, capability), **static), mesh)


def run_batches(
  function: Callable,
  params: Params,
  batches: Iterable[dict[str, np.ndarray]],
  mesh: Mesh,
) -> np.ndarray:
  """Applies `function(params, batch)` to every batch and drops the padding.

  Args:
    function: returns an array `[B, ...]`.
    params: the method's parameters.
    batches: dicts of arrays `[B, ...]`: what the function reads, and `mask`,
      bool, False for padding.
    mesh: where the batches go.

  Returns:
    One row for each example, `[N, ...]`, in order.
  """
  done, pending = [], None

  for batch in batches:
    inputs = {k: v for k, v in batch.items() if k not in ("mask", "image_id")}
    started = function(params, put(inputs, mesh)), batch["mask"]
    # Fetch one batch late: the device works while the host decodes.
    if pending is not None:
      done.append(np.asarray(pending[0])[pending[1]])
    pending = started
  if pending is None:
    raise ValueError("no examples to evaluate")
  done.append(np.asarray(pending[0])[pending[1]])
  return np.concatenate(done)


def spread(count: int, most: int) -> list[int]:
  """Picks up to `most` of `count` places, evenly: nobody chose them."""
  most = min(count, most)
  return [i * count // most for i in range(most)]


def pad_rows(rows: np.ndarray, size: int) -> np.ndarray:
  """Repeats the first row until there are `size`: always a valid example."""
  filler = np.broadcast_to(rows[:1], (size - len(rows), *rows.shape[1:]))
  return np.concatenate([rows, filler])
