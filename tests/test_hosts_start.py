"""How processes find one another, and what one says that has to end."""

import errno
import http.server
import signal
import socket
import threading
import time

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


@pytest.mark.parametrize(
  "error, status",
  [
    (RuntimeError("Failed to recognize coordinator address a:8476"), 69),
    (RuntimeError("Retry failed with all attempts exhausted"), 69),
    (RuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded"), 69),
    (RuntimeError("expected HOSTNAME env variable to be defined"), 2),
    (ValueError("coordinator_address should be defined."), 2),
  ],
)
def test_who_waits_in_vain_for_a_cluster_may_start_again(
  error, status, monkeypatch, capsys
):
  """A slice that a cluster is replacing is late: that is no mistake."""

  def initialize(**_):
    raise error

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  _assert_ends(lambda _: hosts.initialize(CLUSTERS["slices"]), status)
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1 and said[0].startswith("error: ")
  assert str(error) in said[0]


@pytest.mark.parametrize("saves", [True, False])
def test_sigterm_ends_what_saves_nothing(saves, monkeypatch):
  """JAX notes it for who asks; who never asks would not hear of it."""

  def note(*_):
    pass

  def initialize(**_):
    waits_with.append(signal.getsignal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, note)

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  waits_with, before = [], signal.signal(signal.SIGTERM, lambda *_: None)
  try:
    hosts.initialize(CLUSTERS["slices"], saves=saves)
    expected = note if saves else signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == expected
    assert waits_with == [signal.SIG_DFL]
  finally:
    signal.signal(signal.SIGTERM, before)


def _assert_ends(main, status):
  with pytest.raises(SystemExit) as end:
    command.execute(main)
  assert end.value.code == status


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


class _Process(threading.Thread):
  """Calls `meet` with its arguments."""

  def __init__(self, *args):
    super().__init__(daemon=True)
    self._told, self._raised = args, None

  def run(self):
    try:
      roll_call.meet(*self._told)
    except Exception as error:
      self._raised = error

  def end(self):
    """Returns what it says that has to end, or None. Bugs are raised."""
    self.join(timeout=120)
    assert not self.is_alive()
    if self._raised is None:
      return None
    if not isinstance(self._raised, UserError):
      raise self._raised
    return str(self._raised)


def _meet(*told, seconds=60.0, address=None):
  """Calls `meet` with each (count, number); returns what they raise."""
  address = address or f"localhost:{free_port()}"
  processes = [_Process(address, *each, seconds) for each in told]
  for process in processes:
    process.start()
  return [process.end() for process in processes]


def test_all_come():
  assert _meet((3, 2), (3, 0), (3, 1)) == [None] * 3


def test_one_does_not_come():
  first, second = _meet((4, 0), (4, 2), seconds=3)
  assert "of the 4 processes, 1, 3 did not come within" in first
  assert "could not be reached" in second or "gave up" in second


def test_the_first_cannot_be_reached():
  (error,) = _meet((2, 1), seconds=0.3)
  assert "process 0 could not be reached at localhost:" in error


@pytest.mark.parametrize("number", ["0", "1"])
def test_who_waits_in_vain_may_start_again(number, monkeypatch, capsys):
  monkeypatch.setattr(hosts, "_START_SECONDS", 0.3)
  told = {hosts.ADDRESS: f"localhost:{free_port()}", hosts.COUNT: "2"}
  environ = {**told, hosts.NUMBER: number}
  _assert_ends(lambda _: hosts.initialize(environ), 69)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and "within 0 s" in line


def test_the_first_gives_up(capsys):
  """It has answered, and ended without a word: that may be no mistake."""
  with socket.create_server(("localhost", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"

    def hang_up():
      other, _ = server.accept()
      other.recv(100)
      other.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    _assert_ends(lambda _: roll_call.meet(address, 2, 1, 10.0), 69)
    thread.join(timeout=20)
  assert "process 0 gave up" in capsys.readouterr().err


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
  first, second = (
    _Process(f"localhost:{port}", 2, number, 60.0) for number in (0, 1)
  )
  first.start()
  with _connect(port) as loud, _connect(port):  # the second never speaks
    loud.sendall(b"GET / HTTP/1.1\r\n")
    second.start()
    assert [first.end(), second.end()] == [None, None]


def _connect(port):
  deadline = time.monotonic() + 30
  while True:  # it is about to listen
    try:
      return socket.create_connection(("localhost", port))
    except ConnectionRefusedError:
      assert time.monotonic() < deadline
      time.sleep(0.01)


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
    (hosts.StartAgainError("2 is damaged"), 75, "2 is damaged"),
    (ZeroDivisionError("a bug"), 1, "Traceback"),
    (OSError(errno.EIO, "Input/output error"), 1, "Traceback"),
    (
      OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"),
      2,
      "error: host 0: no space left on the disk (metrics.jsonl); free some",
    ),
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
