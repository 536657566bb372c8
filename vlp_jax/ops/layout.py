"""Where the rows of a batch lie, while a step is traced.

Parameters are split over the devices that a batch is cut over, too. Left to
itself, XLA's partitioner may then move activations instead of weights, which
are smaller. So the products of rows with weights say that rows stay put.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vlp_jax.ops import contexts
from vlp_jax.ops import rows as rows_lib

_SHARDING: ContextVar[NamedSharding | None] = ContextVar("layout", default=None)


def batch(sharding: NamedSharding) -> AbstractContextManager[NamedSharding]:
  """A context in which what is traced has batches with this sharding."""
  return contexts.within(_SHARDING, sharding)


def _cuts(x: jax.Array) -> NamedSharding | None:
  """The batch's sharding, where several devices divide the rows of `x`."""
  sharding = _SHARDING.get()
  count = rows_lib.devices(sharding)
  return None if count == 1 or x.shape[0] % count else sharding


def keep_rows(x: jax.Array) -> jax.Array:
  """Keeps rows `[R, ...]`, in the order of the batch, on their devices.

  Other axes are left to the partitioner. Does nothing outside of `batch`, on
  one device, and to rows that devices do not divide: those of no batch.
  """
  sharding = _cuts(x)
  if sharding is None:
    return x
  free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
  spec = PartitionSpec(sharding.spec[0], *free)
  return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))


def on_each_device(
  function: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
  """Applies a function to the rows that each device holds, apart from others.

  Under `vmap` a loop goes on until all rows are done: left to the partitioner,
  all devices would tell each other so after every turn. Where `keep_rows` does
  nothing, the function is just applied.

  Args:
    function: maps `[r, ...]` to `[r, ...]`, each row by itself; it closes over
      no traced array.
    x: `[R, ...]`, in the order of the batch.
  """
  sharding = _cuts(x)
  if sharding is None:
    return function(x)
  rows = PartitionSpec(sharding.spec[0])
  return jax.shard_map(
    function,
    mesh=sharding.mesh,
    in_specs=rows,
    out_specs=rows,
    check_vma=False,
  )(x)


def holds_groups(rows: int, group: int) -> bool:
  """Tells whether devices hold whole groups of a batch's consecutive rows.

  Args:
    rows: of the batch, or of a chunk of it.
    group: rows of a group.
  """
  count = rows_lib.devices(_SHARDING.get())
  return count == 1 or rows % (count * group) == 0
