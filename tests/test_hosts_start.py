"""How processes find one another, and what one says that has to end."""

import contextlib
import http.server
import socket
import threading

import jax
import pytest

from tests.toys import free_port
from vlp_jax import command, hosts, roll_call
from vlp_jax.errors import UserError

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


# --- TPU VMs, whose metadata tell of the others ------------------------------


@pytest.fixture
def metadata():
  """A metadata server: what it knows, and its environment; TPUs were found."""
  known, asked = {}, []

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
      asked.append(name)
      known_to_us = name in known and self.headers["Metadata-Flavor"]
      self.send_response(200 if known_to_us else 404)
      self.end_headers()
      self.wfile.write(known.get(name, "").encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("localhost", 0), Server) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"localhost:{server.server_port}"
    yield known, {"TPU_ML_PLATFORM": "JAX", "GCE_METADATA_IP": address}, asked
    server.shutdown()
    thread.join()


@pytest.mark.parametrize(
  "known, several",
  [
    ({"worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"}, True),
    ({"worker-network-endpoints": "a:1:10.0.0.1"}, False),
    (
      {
        "worker-network-endpoints": "a:1:10.0.0.1",
        "tpu-env": "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\n",
      },
      True,
    ),
    ({"tpu-env": "MEGASCALE_NUM_SLICES: '1'\n"}, False),
    ({}, False),
  ],
)
def test_a_tpu_slice_by_its_metadata(metadata, known, several):
  knows, environ, asked = metadata
  knows.update(known)
  expected = {"local_device_ids": None} if several else None
  assert hosts.arguments(environ) == expected
  assert asked


def test_nobody_is_asked_without_a_tpu(metadata):
  knows, environ, asked = metadata
  knows["worker-network-endpoints"] = "a,b"
  del environ["TPU_ML_PLATFORM"]
  assert hosts.arguments(environ) is None
  environ |= {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}
  assert hosts.arguments(environ) is None
  assert not asked


def test_accelerators_of_hosts_that_did_not_join(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  with pytest.raises(UserError, match=r"of 4 hosts.*JAX_NUM_PROCESSES"):
    hosts.initialize({})


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


# --- The end -----------------------------------------------------------------


@pytest.mark.parametrize(
  "error, status, first_line",
  [
    (UserError("this is wrong"), 2, "error: host 0: this is wrong"),
    (
      jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: closed"),
      69,
      "error: host 0: another host has ended, see what it says (UNKNOWN: Gloo",
    ),
    (ZeroDivisionError("a bug"), 1, "Traceback"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 1, "Traceback"),
  ],
)
def test_a_process_that_fails_waits_for_nobody(
  error, status, first_line, monkeypatch, capsys
):
  """An orderly end would wait for hosts that wait for this one."""
  left = []

  def leave(status):
    left.append(status)
    raise SystemExit(status)

  def fail(_):
    raise error

  monkeypatch.setattr(hosts, "several", lambda: True)
  monkeypatch.setattr(hosts.os, "_exit", leave)
  monkeypatch.setattr(hosts.time, "sleep", lambda _: None)
  with pytest.raises(SystemExit):
    command.execute(fail)
  assert left == [status]
  assert capsys.readouterr().err.startswith(first_line)
