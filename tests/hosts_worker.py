"""What each process of a test of several hosts runs.

python -m tests.hosts_worker FOLDER JOB...

The environment tells it of the others. A job is the name of a function here
and its arguments, as in `gradients:clip:1,2,2:2`; the first process keeps what
it returns in FOLDER/<job>.pickle.
"""

import functools
import os
import pathlib
import pickle
import signal
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import test_train_step, toys
from vlp_jax import checkpoint, hosts, sharding, skips, train_step
from vlp_jax.errors import UserError

LEARNING_RATE = 0.05


def run_step(name, shape, accumulate, optimizer, num_steps, size):
  """Steps of a method from drawn parameters: metrics, and the last state.

  Works in one process (with the first devices) and in several.
  """
  mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
  method = toys.method(*test_train_step.METHODS[name])
  start = functools.partial(test_train_step.start_of, name, optimizer)
  shardings = sharding.shardings_for(jax.eval_shape(start), mesh)
  state = toys.jit(start, out_shardings=shardings)()
  step = toys.jit(
    train_step.make_train_step(
      method, optimizer, accumulate=accumulate, mesh=mesh, ema_decay=0.0
    ),
    out_shardings=(shardings, None),
  )
  blocks, count = sharding.host_blocks(mesh)
  rows = np.arange(size).reshape(count, -1)[list(blocks)].reshape(-1)
  metrics = []
  for seed in range(num_steps):
    batch = toys.batch(size, seed)
    del batch["index"]
    local = {key: value[rows] for key, value in batch.items()}
    state, values = step(state, sharding.put_batch(local, mesh))
    metrics.append(jax.device_get(values))
  everywhere = NamedSharding(mesh, P())
  whole = toys.jit(lambda x: x, out_shardings=everywhere)
  kept = whole((state.params, state.opt_state.inner))
  return metrics, jax.device_get(kept)


def gradients(name, shape, accumulate="1", size=None):
  """Metrics and gradients of one step."""
  optimizer = skips.skip_nonfinite(toys.record_gradients())
  size = size or size_of(shape, accumulate)
  args = _shape(shape), int(accumulate), optimizer, 1, size
  (metrics,), (_, found) = run_step(name, *args)
  return metrics, found


def size_of(shape, accumulate="1"):
  """Examples such that no chunk of a device cuts a group of four."""
  data, fsdp, _ = _shape(shape)
  return max(64, 4 * data * fsdp * int(accumulate))


def sgd(name, shape, accumulate="1"):
  """Losses and parameters of ten steps."""
  optimizer = skips.skip_nonfinite(optax.sgd(LEARNING_RATE))
  args = _shape(shape), int(accumulate), optimizer, 10, 64
  metrics, (params, _) = run_step(name, *args)
  return [values["loss"] for values in metrics], params


def preemption():
  """One host hears SIGTERM: which number all stop at; and after the loop."""
  with hosts.Preemption() as preempted:
    number = 0
    while number < 600:
      number += 1
      if preempted.reached(number):
        break
      if number == 3 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      # Hosts are not equally fast.
      time.sleep(0.05 + 0.02 * jax.process_index())
  ended = []
  with mock.patch("os._exit", ended.append):
    os.kill(os.getpid(), signal.SIGTERM)
  return {"stops": _all(number), "ended": ended}


def facts():
  """What hosts agree on, and count, by `hosts.py`."""
  hosts.check_same({"data": [1, 2], "config": "a"})
  try:
    hosts.check_same({"data": [1, 2], "config": f"a{jax.process_index()}"})
    error = ""
  except UserError as caught:
    error = str(caught)
  counts = {"a": 5 + jax.process_index(), "b": 2}
  split = sharding.make_mesh((jax.device_count(), 1, 1))
  alike = sharding.make_mesh((1, 1, jax.device_count()))
  # As TPUs may be laid out: neighbours in the mesh are of different hosts.
  order = [jax.devices()[i] for i in (0, 2, 1, 3)]
  mixed = sharding.make_mesh((4, 1, 1), order)
  mixed_blocks, _ = sharding.host_blocks(mixed)
  rows = np.arange(8).reshape(4, 2)[list(mixed_blocks)].reshape(-1)
  put = sharding.put_batch({"rows": rows}, mixed)["rows"]
  everywhere = NamedSharding(mixed, P())
  split, _ = sharding.host_blocks(split)
  alike, _ = sharding.host_blocks(alike)
  return {
    "error": error,
    "blocks": _all(np.asarray(split)),
    "mixed": _all(np.asarray(mixed_blocks)),
    "rows": jax.jit(lambda x: x, out_shardings=everywhere)(put),
    "alike": alike,
    "split total": hosts.total(counts, split),
    "alike total": hosts.total({"a": 5, "b": 2}, alike),
  }


def put():
  """What hosts made differently is the first one's."""
  mesh = sharding.make_mesh((1, jax.device_count(), 1))
  made = {"x": np.arange(8, dtype=np.float32) + jax.process_index()}
  laid = hosts.put(made, {"x": NamedSharding(mesh, P("fsdp"))})
  whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
  return {**jax.device_get(whole(laid)), "spec": laid["x"].sharding.spec}


def save(folder, mesh=None):
  """Saves a state that is split over all devices."""
  mesh = mesh or sharding.make_mesh((1, jax.device_count(), 1))
  state = jax.tree.map(_lay, tree(), shardings(mesh))
  checkpoints = checkpoint.Checkpointer(folder)
  checkpoints.save(3, state, {"seconds": 1.0})
  checkpoints.close()


def restore(folder):
  """Restores what another number of hosts has saved."""
  mesh = sharding.make_mesh((1, jax.device_count() // 2, 2))
  state, meta = restored(folder, mesh)
  whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
  return jax.device_get(whole(state)), meta


def restored(folder, mesh):
  """A state onto a mesh, and `meta`."""
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree(),
    shardings(mesh),
  )
  checkpoints = checkpoint.Checkpointer(folder, writable=False)
  found = checkpoints.restore(abstract)
  checkpoints.close()
  return found


def tree():
  """A state to save."""
  draw = np.random.default_rng(0)
  big = draw.standard_normal((16, 24), np.float32)
  return {"big": big, "half": big.astype(jnp.bfloat16), "step": np.int32(3)}


def shardings(mesh):
  """Where the arrays of `tree` are."""
  split = NamedSharding(mesh, P("fsdp", "tensor"))
  return {"big": split, "half": split, "step": NamedSharding(mesh, P())}


def _lay(array, sharding):
  """Lays what every host holds over the mesh."""
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def _all(value):
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(np.asarray(value)).tolist()


def _shape(text):
  return tuple(map(int, text.split(",")))


def main(folder, *jobs):
  """Runs jobs in order."""
  hosts.initialize()
  sharding.MIN_SIZE = 64  # toys are small: split them all the same
  for job in jobs:
    name, *args = job.split(":")
    result = globals()[name](*args)
    if hosts.is_first():
      file = pathlib.Path(folder, f"{job.replace('/', '_')}.pickle")
      file.write_bytes(pickle.dumps(jax.device_get(result)))


if __name__ == "__main__":
  main(*sys.argv[1:])
