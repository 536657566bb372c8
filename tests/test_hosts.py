"""Several processes against one: numbers, agreement, checkpoints, the start."""

import contextlib
import functools
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from tests import hosts_worker, toys
from vlp_jax import hosts, roll_call, sharding
from vlp_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
  """A port that nobody listens to."""
  with socket.socket() as found:
    found.bind(("", 0))
    return found.getsockname()[1]


def _run(folder, count, *jobs):
  """Runs jobs in `count` processes of two devices; returns their results."""
  port, processes = free_port(), []
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
    statuses = [process.wait(timeout=900) for process in processes]
  logs = [(folder / f"log{number}").read_text() for number in range(count)]
  assert statuses == [0] * count, "\n".join(logs)
  names = [job.replace("/", "_") for job in jobs]
  return {
    job: pickle.loads((folder / f"{name}.pickle").read_bytes())
    for job, name in zip(jobs, names, strict=True)
  }


# --- The numbers of one process ----------------------------------------------

QUICK = ("gradients:coca:2,2,1:2", "sgd:clip:1,1,4")
SLOW = {
  2: (
    "gradients:clip:2,1,2:4",
    "gradients:sycoca:1,4,1:16",
    "gradients:simla:1,2,2:4",
    "gradients:scl:1,1,4:1",
    "sgd:coca:1,4,1:4",
  ),
  4: (
    "gradients:clip:2,2,2:1",
    "gradients:clip:4,2,1:16",
    "gradients:coca:1,8,1:4",
    "gradients:sycoca:2,2,2:1",
    "gradients:sycoca:8,1,1:4",
    "gradients:albef:2,2,2:4",
    "gradients:albef:4,2,1:16",
    "gradients:simla:1,4,2:1",
    "gradients:simla:2,4,1:16",
    "gradients:scl:4,1,2:1",
    "gradients:scl:2,2,2:4",
    "gradients:scl:1,8,1:16",
    "sgd:clip:1,1,8",
  ),
}


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
@pytest.mark.parametrize("count", SLOW)
def test_every_method_computes_what_one_process_does(count, tmp_path):
  for job, found in _run(tmp_path, count, *SLOW[count]).items():
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


def test_counts_add_up_once_for_each_row(found):
  assert found["facts"]["split total"] == {"a": 5 + 6, "b": 4}
  assert found["facts"]["alike total"] == {"a": 5, "b": 2}


def test_hosts_that_see_different_things_stop(found):
  assert "hosts 0 and 1" in found["facts"]["error"]
  assert ": config;" in found["facts"]["error"]


def test_a_host_that_hears_sigterm_tells_the_others(found):
  mine, other = found["preemption"]
  assert mine == other
  assert 3 < mine < 600


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


# --- Who takes part ----------------------------------------------------------

TOLD = {hosts.ADDRESS: "10.0.0.1:1234", hosts.COUNT: "4", hosts.NUMBER: "3"}
SLURM = {
  "SLURM_STEP_NODELIST": "n[1-2]",
  "SLURM_PROCID": "1",
  "SLURM_NTASKS": "2",
  "SLURM_NNODES": "2",
}
ALONE = {
  "a laptop": {},
  "told to be alone": {**TOLD, hosts.COUNT: "1", hosts.NUMBER: "0"},
  "one task of Slurm": {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
  "a batch script, without srun": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
  "one of Open MPI": {"OMPI_COMM_WORLD_SIZE": "1"},
  "one TPU host": {"TPU_WORKER_HOSTNAMES": "localhost"},
  "one TPU host in a JobSet": {
    "TPU_WORKER_HOSTNAMES": "a",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "0",
  },
  "one slice": {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"},
  "a pod that is no job": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
}
CLUSTERS = {
  "Slurm": SLURM,
  "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2"},
  "TPU": {"TPU_WORKER_HOSTNAMES": "a,b"},
  "TPU, by address": {"TPU_PROCESS_ADDRESSES": "a:1,b:1"},
  "slices": {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
  "indexed job": {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "0",
  },
}


@pytest.mark.parametrize("name", ALONE)
def test_a_process_by_itself(name):
  assert hosts.arguments(ALONE[name]) is None


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_that_jax_knows(name):
  assert hosts.arguments(CLUSTERS[name]) == {"local_device_ids": None}


def test_processes_that_are_told():
  assert hosts.arguments({**TOLD, **SLURM}) == {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
  }


@pytest.mark.parametrize(
  "more, expected",
  [
    ({"SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
    ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "16"}, None),  # one a GPU
    ({"SLURM_GPUS_ON_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "3"}, None),
  ],
)
def test_one_task_a_machine_has_all_its_gpus(more, expected):
  options = hosts.arguments({**SLURM, **more})
  assert options == {"local_device_ids": expected}


@pytest.mark.parametrize(
  "changed, hint",
  [
    ({hosts.COUNT: ""}, "but not JAX_NUM_PROCESSES"),
    ({hosts.ADDRESS: "", hosts.NUMBER: ""}, "JAX_COORDINATOR_ADDRESS and"),
    ({hosts.NUMBER: "4"}, "from 0 to below"),
    ({hosts.NUMBER: "one"}, "from 0 to below"),
    ({hosts.ADDRESS: "10.0.0.1"}, "host:port"),
    ({hosts.ADDRESS: "10.0.0.1:port"}, "host:port"),
  ],
)
def test_half_told_is_a_mistake(changed, hint):
  with pytest.raises(UserError, match=hint):
    hosts.arguments({**TOLD, **changed})


def test_a_cluster_that_jax_cannot_read(monkeypatch):
  def initialize(**_):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  # Open MPI 5 tells no address.
  with pytest.raises(UserError, match="with JAX_COORDINATOR_ADDRESS, JAX_NUM"):
    hosts.initialize({"OMPI_COMM_WORLD_SIZE": "2"})


# --- The roll call -----------------------------------------------------------


def _meet(*told, seconds=10.0, address=None):
  """Calls `meet` with each (count, number); returns what they raise."""
  address = address or f"localhost:{free_port()}"
  raised = [None] * len(told)

  def call(place):
    try:
      roll_call.meet(address, *told[place], seconds)
    except UserError as error:
      raised[place] = str(error)

  threads = [threading.Thread(target=call, args=(i,)) for i in range(len(told))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
    assert not thread.is_alive()
  return raised


def test_all_come():
  assert _meet((3, 2), (3, 0), (3, 1)) == [None] * 3


def test_one_does_not_come():
  first, second = _meet((4, 0), (4, 2), seconds=0.5)
  assert "of the 4 processes, 1, 3 did not come within" in first
  assert "could not be reached" in second or "gave up" in second


def test_the_first_cannot_be_reached():
  (error,) = _meet((2, 1), seconds=0.3)
  assert "process 0 could not be reached at localhost:" in error


def test_two_have_a_number():
  first, *others = _meet((3, 0), (3, 1), (3, 1))
  assert "two processes have the number 1" in first
  assert others == [first, first]


def test_they_were_told_different_counts():
  errors = _meet((2, 0), (3, 1))
  assert all("told of 3 processes, and process 0 of 2" in e for e in errors)


def test_a_port_that_is_taken():
  with socket.create_server(("", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
    (error,) = _meet((2, 0), address=address)
  assert "cannot use port" in error


def test_strangers_at_the_port():
  """Who says something else, or nothing, is not counted."""
  port = free_port()
  threads = []
  for number in (0, 1):
    args = (f"localhost:{port}", 2, number, 10.0)
    threads.append(threading.Thread(target=roll_call.meet, args=args))
  threads[0].start()
  with _connect(port) as loud, _connect(port):  # the second never speaks
    loud.sendall(b"GET / HTTP/1.1\r\n")
    threads[1].start()
    for thread in threads:
      thread.join(timeout=20)
      assert not thread.is_alive()


def _connect(port):
  while True:  # it is about to listen
    with contextlib.suppress(ConnectionRefusedError):
      return socket.create_connection(("localhost", port))
