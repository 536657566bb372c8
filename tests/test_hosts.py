"""Several processes against one: numbers, agreement, checkpoints."""

import contextlib
import functools
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import hosts_worker, toys
from vlp_jax import hosts, sharding

ROOT = pathlib.Path(__file__).parents[1]


def _run(folder, count, *jobs):
  """Runs jobs in `count` processes of two devices; returns their results."""
  port, processes = toys.free_port(), []
  with contextlib.ExitStack() as stack:
    for number in range(count):
      environ = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        hosts.ADDRESS: f"localhost:{port}",
        hosts.COUNT: str(count),
        hosts.NUMBER: str(number),
      }
      log = stack.enter_context((folder / f"log{number}").open("w"))
      process = subprocess.Popen(
        [sys.executable, "-m", "tests.hosts_worker", folder, *jobs],
        cwd=ROOT,
        env=environ,
        stdout=log,
        stderr=subprocess.STDOUT,
      )
      stack.callback(process.kill)
      processes.append(process)
    statuses = [process.wait(timeout=1800) for process in processes]
  logs = [(folder / f"log{number}").read_text() for number in range(count)]
  assert statuses == [0] * count, "\n".join(logs)
  names = [job.replace("/", "_") for job in jobs]
  return {
    job: pickle.loads((folder / f"{name}.pickle").read_bytes())
    for job, name in zip(jobs, names, strict=True)
  }


# --- The numbers of one process ----------------------------------------------

QUICK = ("gradients:clip:2,2,1:2", "sgd:clip:1,1,4")
SLOW = (
  (2, "gradients:coca:2,2,1:2", "gradients:clip:2,1,2:4", "sgd:clip:2,2,1"),
  (2, "gradients:sycoca:1,4,1:16", "sgd:coca:1,4,1:4"),
  (2, "gradients:simla:1,2,2:4", "gradients:scl:1,1,4:1"),
  (4, "gradients:clip:2,2,2:1", "gradients:clip:4,2,1:16", "sgd:clip:1,1,8"),
  (4, "gradients:coca:1,8,1:4", "gradients:coca:2,2,2:16"),
  (4, "gradients:sycoca:2,2,2:1", "gradients:sycoca:8,1,1:4"),
  (4, "gradients:albef:2,2,2:4", "gradients:albef:4,2,1:16"),
  (4, "gradients:simla:1,4,2:1", "gradients:simla:2,4,1:16"),
  (4, "gradients:scl:4,1,2:1", "gradients:scl:2,2,2:4"),
  (4, "gradients:scl:1,8,1:16"),
)


@functools.cache
def _sgd_of_one(name):
  return hosts_worker.sgd(name, "1,1,1")


def _assert_close(actual, expected):
  error = np.max(np.abs(actual - expected))
  assert error <= 1e-5 * np.max(np.abs(expected))


def _assert_as_one(job, found):
  """Compares with one device, which takes the batch in one piece."""
  kind, name, shape, *accumulate = job.split(":")
  if kind == "sgd":
    losses, params = found
    expected_losses, expected = _sgd_of_one(name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(_assert_close, params, expected)
    return
  size = hosts_worker.size_of(shape, *accumulate)
  metrics, gradient = found
  expected_metrics, expected = hosts_worker.gradients(name, "1,1,1", size=size)
  assert metrics.keys() == expected_metrics.keys()
  for key, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
  toys.assert_gradients_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
  "count, jobs",
  [pytest.param(count, jobs, id=f"{count}:{jobs[0]}") for count, *jobs in SLOW],
)
def test_every_method_computes_what_one_process_does(count, jobs, tmp_path):
  for job, found in _run(tmp_path, count, *jobs).items():
    _assert_as_one(job, found)


# --- What hosts agree on -----------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh((1, 4, 2), jax.devices()[:8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def found(folder, mesh):
  """What two processes did; they also read what this one has saved."""
  hosts_worker.save(folder / "one", mesh)
  jobs = ["facts", "put", "preemption", f"save:{folder}/two"]
  results = _run(folder, 2, *QUICK, *jobs, f"restore:{folder}/one")
  return {job.partition("/")[0]: result for job, result in results.items()}


@pytest.mark.parametrize("job", QUICK)
def test_two_processes_compute_what_one_does(found, job):
  _assert_as_one(job, found[job])


def test_ten_steps_move_parameters():
  """So that comparing them compares something."""
  start = toys.params("clip")
  _, params = _sgd_of_one("clip")
  moved = jax.tree.map(
    lambda a, b: np.max(np.abs(a - b)) / np.max(np.abs(a)), start, params
  )
  assert np.median(jax.tree.leaves(moved)) > 1e-3


def test_hosts_know_their_rows(found):
  facts = found["facts"]
  assert facts["blocks"] == [[0, 1], [2, 3]]
  assert facts["alike"] == (0,)  # the axis `tensor` spans both
  assert facts["mixed"] == [[0, 2], [1, 3]]
  np.testing.assert_array_equal(facts["rows"], np.arange(8))


def test_counts_add_up_once_for_each_row(found):
  assert found["facts"]["split total"] == {"a": 5 + 6, "b": 4}
  assert found["facts"]["alike total"] == {"a": 5, "b": 2}


def test_hosts_that_see_different_things_stop(found):
  assert "hosts 0 and 1" in found["facts"]["error"]
  assert ": config;" in found["facts"]["error"]


def test_a_host_that_hears_sigterm_tells_the_others(found):
  mine, other = found["preemption"]["stops"]
  assert mine == other
  assert 3 < mine < 600
  # After the last step there is nothing to save.
  assert found["preemption"]["ended"] == [75]


def test_what_hosts_make_is_of_the_first(found):
  np.testing.assert_array_equal(found["put"]["x"], np.arange(8))
  assert found["put"]["spec"] == jax.sharding.PartitionSpec("fsdp")


def test_a_checkpoint_of_two_processes_restores_in_one(found, folder, mesh):
  state, meta = hosts_worker.restored(folder / "two", mesh)
  toys.assert_trees_equal(jax.device_get(state), hosts_worker.tree())
  assert meta == {"seconds": 1.0}
  assert state["big"].sharding.mesh == mesh


def test_a_checkpoint_of_one_process_restores_in_two(found):
  state, meta = found["restore:"]
  toys.assert_trees_equal(state, hosts_worker.tree())
  assert meta == {"seconds": 1.0}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_counts_are_dealt_out_whole(count):
  parts = [
    hosts.share({"a": 7, "b": 0}, range(8)[i :: 8 // count], 8)
    for i in range(8 // count)
  ]
  assert sum(part["a"] for part in parts) == 7
  assert all(part["b"] == 0 for part in parts)
  assert max(part["a"] for part in parts) <= -(-7 * count // 8) + 1


def test_alone_nothing_is_asked_of_anybody():
  assert not hosts.several() and hosts.is_first()
  hosts.check_same({"anything": object()})
  assert hosts.total({"a": 1}, (0,)) == {"a": 1}
  hosts.abandon(2)  # returns
