"""One run on many hosts: who takes part, what they agree on, how they end.

Every host runs the same program on its part of each batch. `initialize` joins
the processes, if they were told of one another or a cluster shows that there
are several; a process by itself is left as it is, and asks nobody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlp_jax import preemption, roll_call, tpu_vm
from vlp_jax.errors import UserError

# Where processes are told of one another: all three, or none.
ADDRESS, COUNT, NUMBER = EXPLICIT = (
  "JAX_COORDINATOR_ADDRESS",
  "JAX_NUM_PROCESSES",
  "JAX_PROCESS_ID",
)
# Hosts of a cluster start minutes apart.
_START_SECONDS = 300
# Without a sign of life for so long, a host is given up.
_HEARTBEAT_SECONDS = 40
# What the others get to end by themselves, before process 0 takes with it what
# they talk through.
_LAST_SECONDS = 3
# How JAX tells that others of a cluster did not come in time: by the name of
# the first that nobody knows yet, or by an address that does not answer.
_ABSENT = (
  *("Failed to recognize coordinator", "Retry failed with all attempts"),
  *("DEADLINE_EXCEEDED", "UNAVAILABLE", "Timed out", "timed out"),
)
# How the loss of another host shows: in Gloo's, gRPC's and JAX's words.
_LOST = (
  *("Gloo", "Connection reset", "Connection closed", "UNAVAILABLE"),
  *("heartbeat", "unhealthy", "another task died", "Barrier"),
)


class StartAgainError(Exception):
  """This process cannot go on, since others may not know what it has mended."""


def initialize(
  environ: Mapping[str, str] = os.environ, *, saves: bool = True
) -> None:
  """Joins the other processes of the run; call it before JAX is used.

  Args:
    environ: of the process, see `arguments`.
    saves: whether SIGTERM is for `Preemption` to note, as JAX has it for all
      that have joined; else it ends the process, as it does a process alone.

  Raises:
    AbsentError: if the others do not come in time, see `roll_call`.
    UserError: if what was told is incomplete, or cannot be.
  """
  options = arguments(environ)
  if options is None:
    _check_alone()
    return
  if "coordinator_address" in options:
    roll_call.meet(
      options["coordinator_address"],
      options["num_processes"],
      options["process_id"],
      _START_SECONDS,
    )
  _leave_sigterm()  # Python's handlers would wait as long as JAX does
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError, KeyError) as error:
    late = isinstance(error, RuntimeError)
    if late and any(word in str(error) for word in _ABSENT):
      raise roll_call.AbsentError(
        f"other processes of this cluster did not come in time ({error})"
      ) from error
    raise UserError(
      f"the processes of this cluster could not be joined ({error}); tell them "
      f"of one another with {', '.join(EXPLICIT)}"
    ) from error
  if not saves:
    _leave_sigterm()
  if not is_first():  # what all would say, the first one says
    logging.getLogger("absl").setLevel(logging.ERROR)


def _leave_sigterm() -> None:
  """Has SIGTERM end this process, until somebody else handles it."""
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_alone() -> None:
  """Refuses accelerators that belong to several hosts, unless these joined."""
  if jax.process_count() > 1:
    raise UserError(
      f"the accelerators are those of {jax.process_count()} hosts, which do "
      f"not know of one another; tell them with {', '.join(EXPLICIT)}"
    )


def arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns what `jax.distributed.initialize` is to be called with.

  Args:
    environ: of the process. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
      `JAX_PROCESS_ID` say all; else a cluster's own variables, which JAX
      reads, say that there are several processes.

  Returns:
    Arguments by name, or None for a process by itself.

  Raises:
    UserError: if the three are incomplete or no numbers.
  """
  told = {name: environ[name] for name in EXPLICIT if environ.get(name)}
  if told:
    return _explicit(told)
  if not _in_cluster(environ):
    return None
  return {"local_device_ids": _local_devices(environ)}


def _explicit(told: Mapping[str, str]) -> dict[str, Any] | None:
  missing = [name for name in EXPLICIT if name not in told]
  if missing:
    raise UserError(
      f"{' and '.join(told)} is set, but not {' and '.join(missing)}; set all "
      "three, or none for a single process"
    )
  try:
    count, number = int(told[COUNT]), int(told[NUMBER])
    port = int(told[ADDRESS].rpartition(":")[2])
    possible = 0 <= number < count and 0 < port < 2**16
  except ValueError:
    possible = False
  if not possible or ":" not in told[ADDRESS]:
    text = " ".join(f"{name}={value}" for name, value in told.items())
    raise UserError(
      f"{text}: the first must be host:port, the second the number of "
      "processes, the third one from 0 to below that"
    )
  if count == 1:
    return None
  return {
    "coordinator_address": told[ADDRESS],
    "num_processes": count,
    "process_id": number,
    "cluster_detection_method": "deactivate",
  }


def _in_cluster(environ: Mapping[str, str]) -> bool:
  """Tells whether a cluster's variables show several processes."""
  workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES"
  )
  if _number(environ, "MEGASCALE_NUM_SLICES") > 1:
    return True
  if workers is not None:  # a TPU on GKE, which may be a single host
    return "," in workers
  if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
    return _number(environ, "SLURM_NTASKS") > 1
  if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
    return True
  if "KUBERNETES_SERVICE_HOST" in environ:
    return "JOB_COMPLETION_INDEX" in environ
  return tpu_vm.is_one_of_several(environ)


def _local_devices(environ: Mapping[str, str]) -> list[int] | None:
  """Returns the GPUs of a process that has its machine for itself.

  JAX gives a process of Slurm or Open MPI one GPU, that of its number on the
  machine. None leaves it so.
  """
  if environ.get("JAX_LOCAL_DEVICE_IDS"):
    return None  # JAX reads it
  alone = (
    "SLURM_PROCID" in environ
    and _number(environ, "SLURM_NTASKS") == _number(environ, "SLURM_NNODES")
  ) or _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") == 1
  visible = [i for i in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if i]
  gpus = len(visible) or _number(environ, "SLURM_GPUS_ON_NODE")
  return list(range(gpus)) if alone and gpus else None


def _number(environ: Mapping[str, str], name: str) -> int:
  value = environ.get(name, "")
  return int(value) if value.isdigit() else 0


def several() -> bool:
  """Tells whether `initialize` has joined this process with others."""
  return jax.distributed.is_initialized()


def is_first() -> bool:
  """Tells whether this process is the one that writes and prints."""
  return jax.process_index() == 0


class Preemption:
  """Notes SIGTERM, on any host, so that all can stop after the same step.

  Alone, a handler of our own notes it. With others, JAX's does, from when they
  were joined on: it also hears of notices that a cluster gives in other ways,
  and picks a step that no host has begun. Use it as a context.
  """

  def __init__(self):
    self._requested = False
    # Signals belong to the main thread; a run inside another goes without.
    self._main = threading.current_thread() is threading.main_thread()
    self._handles = self._main and jax.process_count() == 1

  def __enter__(self) -> Preemption:
    if self._handles:
      self._previous = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_) -> None:
    if self._handles:
      signal.signal(signal.SIGTERM, self._previous)
    elif self._main:  # JAX's would note it, and nobody ask
      preemption.end_on_sigterm()

  def _note(self, *_) -> None:
    self._requested = True

  def reached(self, number: int) -> bool:
    """Tells whether to save and stop now; the same on all hosts.

    Args:
      number: of the step, counted from 1 when this process began: every host
        calls it after every step.
    """
    if jax.process_count() == 1:
      return self._requested
    return multihost_utils.reached_preemption_sync_point(number)


def check_same(facts: Mapping[str, Any]) -> None:
  """Refuses to go on where hosts see different things.

  Args:
    facts: by name, what JSON can hold.

  Raises:
    UserError: on all hosts, with the names of what differs.
  """
  if jax.process_count() == 1:
    return
  hashes = [
    np.frombuffer(
      hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest(),
      np.uint8,
    )
    for fact in facts.values()
  ]
  seen = multihost_utils.process_allgather(np.stack(hashes))  # [P, facts, 32]
  for name, hosts in zip(facts, np.moveaxis(seen, 0, 1), strict=True):
    others = [i for i, own in enumerate(hosts) if (own != hosts[0]).any()]
    if others:
      raise UserError(
        f"hosts 0 and {others[0]} see different things: {name}; all need the "
        "same command, --workdir and data, on a file system that they share"
      )


def total(
  counts: Mapping[str, float], blocks: Sequence[int]
) -> dict[str, float]:
  """Adds up what hosts have counted; every host calls it.

  Args:
    counts: whole numbers, of this host's rows of the batches, by name.
    blocks: which rows these are, see `sharding.host_blocks`; hosts with the
      same ones count once.
  """
  if jax.process_count() == 1:
    return dict(counts)
  row = np.asarray([blocks[0], *counts.values()], np.int32)
  rows = multihost_utils.process_allgather(row)  # [P, 1 + counts]
  found = {first: numbers for first, *numbers in rows.tolist()}
  sums = map(sum, zip(*found.values(), strict=True))
  return dict(zip(counts, sums, strict=True))


def share(
  counts: Mapping[str, int], blocks: Sequence[int], num_blocks: int
) -> dict[str, int]:
  """Deals out what `total` added up, evenly, to any number of hosts.

  Args:
    counts: whole numbers, by name.
    blocks: this host's, of `num_blocks`.
    num_blocks: among all hosts.
  """
  return {
    name: sum((count + num_blocks - 1 - b) // num_blocks for b in blocks)
    for name, count in counts.items()
  }


def put(tree: Any, shardings: Any) -> Any:
  """Lays a tree over the mesh of all hosts.

  Args:
    tree: arrays on the mesh stay; others are those that the first host has
      made, so that all start from the same bits.
    shardings: in the structure of the tree.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def lay(array, sharding):
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return array
    array = multihost_utils.broadcast_one_to_all(np.asarray(array))
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(lay, tree, shardings)


def is_loss(error: BaseException) -> bool:
  """Tells whether an error is that of a host which has lost another."""
  return (
    several()
    and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
    and any(word in str(error) for word in _LOST)
  )


def abandon(status: int) -> None:
  """Ends a process at once that others do not follow; alone, does nothing.

  An orderly end waits for all hosts, and these may wait for this one.
  """
  if not several():
    return
  sys.stdout.flush()
  sys.stderr.flush()
  if is_first():
    time.sleep(_LAST_SECONDS)
  os._exit(status)
