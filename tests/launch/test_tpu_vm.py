"""Cloud TPU VMs: from `create` to `delete`, with preemptions."""

import fcntl
import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.tools import LAUNCH, TOY, environ, heed_interrupts, wait_for

WHERE = ("--name=a run", "--zone=us-east5-b", "--accelerator=v5p-16")
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")


def launch(cloud, action, *args):
  return cloud.launch("tpu_vm.sh", action, *WHERE, "--poll=0", *args)


def installed(cloud):
  """Puts things as `create` and `install` leave them."""
  state = cloud.folder / "cloud"
  (state / "state").write_text("ACTIVE")
  for worker in ("0.0", "0.1"):
    tree = state / f"worker {worker}" / "vlp_jax" / "launch"
    tree.mkdir(parents=True)
    shutil.copy(LAUNCH / "worker.sh", tree)


def done(folder):
  return sorted(path.name for path in folder.glob("done-*"))


def start_worker(cloud, who, *end, launch=None):
  """Starts the command on the first worker, as a connection to it does."""
  tree = cloud.folder / "cloud" / "worker 0.0" / "vlp_jax" / "launch"
  return subprocess.Popen(
    [
      *("bash", tree / "worker.sh", "run", launch or f"of {who}"),
      *("python", TOY, *end),
    ],
    env=environ(WORKER=who),
    stdout=subprocess.PIPE,
    start_new_session=True,
  )


def test_the_whole_life(cloud):
  folder = cloud.folder / "shared disk"
  result = launch(
    cloud,
    "all",
    "--num_slices=2",
    "--setup=mkdir results && echo good >results/table",
    "--from=results",
    f"--to={cloud.folder / 'here'}",
    *("--", "python", TOY, folder),
  )
  assert result.returncode == 0, result.stderr
  verbs = cloud.verbs(*QUEUED)
  asked = [verb for verb in verbs if verb != "describe"]
  assert asked == ["create", "scp", "ssh", "ssh", "scp", "delete"]
  assert done(folder) == ["done-0.0", "done-0.1", "done-1.0", "done-1.1"]
  assert result.stdout.count("starts at 0, --xla_") == 4
  (create,) = (call for call in cloud.calls if "create" in call)
  assert {"--node-count=2", "--node-prefix=a run"} < set(create)
  assert "--runtime-version=v2-alpha-tpuv5" in create
  uv = [call for call in cloud.calls if call[0] == "uv"]
  assert len(uv) == 8 and uv[-1][-1] == ".[tpu]"
  assert (cloud.folder / "here/results/table").read_text() == "good\n"


@pytest.mark.parametrize("how", ["term", "suspend"])
def test_a_preempted_run_goes_on(cloud, how):
  folder = cloud.folder / "shared"
  installed(cloud)
  cloud.plan(how, folder / "at-2-0.0", folder / "at-2-0.1")
  result = launch(cloud, "run", "--spot", "--", "python", TOY, folder, "wait")
  assert result.returncode == 0, result.stderr
  assert done(folder) == ["done-0.0", "done-0.1"]
  assert "restart 1 of at most 100" in result.stderr
  made_again = cloud.verbs(*QUEUED).count("create")
  assert made_again == (how == "suspend")
  assert result.stdout.count("starts at 0") == 2
  assert result.stdout.count("starts at 2") == 2


def test_a_mistake_ends_the_run_at_once(cloud):
  result = launch(cloud, "all", "--", "python", TOY, "x", "mistake")
  assert result.returncode == 2
  assert "must be mended" in result.stderr
  assert result.stdout.count("starts at") == 2
  assert cloud.verbs(*QUEUED)[-1] == "delete"


def test_a_run_that_is_left_behind_ends_first(cloud):
  """A lost connection leaves it running; two would write one folder."""
  folder = cloud.folder / "shared"
  installed(cloud)
  left = start_worker(cloud, "left", folder, "wait")
  wait_for(folder / "at-2-left")
  result = launch(cloud, "run", "--", "python", TOY, folder)
  assert result.returncode == 0, result.stderr
  out, _ = left.communicate(timeout=20)
  assert out.endswith(b"launch-status=75\n")
  assert done(folder) == ["done-0.0", "done-0.1"]


def test_a_run_outlives_its_connection(cloud):
  """And what it prints then is kept; to stop it is the next one's task."""
  folder = cloud.folder / "shared"
  installed(cloud)
  process = start_worker(cloud, "0.0", folder, "wait")
  wait_for(folder / "at-2-0.0")
  assert process.stdout.readline().startswith(b"launch: connected to ")
  assert process.stdout.readline().startswith(b"0.0 starts at 0")
  process.stdout.close()
  tree = cloud.folder / "cloud" / "worker 0.0" / "vlp_jax"
  size = (tree / ".launch.log").stat().st_size
  time.sleep(0.5)
  assert process.poll() is None
  assert (tree / ".launch.log").stat().st_size > size
  stop = ["bash", tree / "launch" / "worker.sh", "stop"]
  subprocess.run(stop, env=environ(), check=True, timeout=20)
  assert (folder / "ended-0.0").read_text() == "75"
  assert process.wait(timeout=20) == 75


def test_a_broken_connection_leaves_the_command_alone(cloud):
  """gcloud connects again; the command goes on, and is heard to its end."""
  folder = cloud.folder / "shared"
  installed(cloud)
  cloud.plan("break", folder / "at-2-0.0", folder / "at-2-0.1")
  process = subprocess.Popen(
    [
      *("bash", LAUNCH / "tpu_vm.sh", "run", *WHERE, "--poll=0"),
      *("--", "python", TOY, folder, "hold"),
    ],
    env=environ(STANDIN=str(cloud.folder / "cloud")),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  connected = 0
  while connected < 3:
    line = process.stdout.readline()
    assert line, process.communicate()
    connected += line.startswith("launch: connected")
  (folder / "go").touch()
  out, err = process.communicate(timeout=20)
  assert process.returncode == 0, err
  assert "Retrying" in err and "restart" not in err
  assert "0.0 is at 4\n" in out and out.count("launch-status=0\n") == 2
  log = cloud.folder / "cloud" / "worker 0.0" / "vlp_jax" / ".launch.log"
  assert log.read_text().count("starts at") == 1
  assert not list(folder.glob("ended-*"))
  assert done(folder) == ["done-0.0", "done-0.1"]


def test_a_run_that_has_begun_is_not_begun_again(cloud):
  """While it runs, and when it has ended, even if another runs by then."""
  folder = cloud.folder / "shared"
  installed(cloud)
  first = start_worker(cloud, "a", folder, "wait", launch="1")
  wait_for(folder / "at-2-a")
  again = start_worker(cloud, "b", folder, "wait", launch="1")
  again.stdout.readline()
  assert again.stdout.readline() == b"a is at 2\n"
  other = start_worker(cloud, "c", folder, "wait", launch="2")
  wait_for(folder / "at-2-c")
  late = start_worker(cloud, "d", folder, "wait", launch="1")
  for process in (first, again, late):
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert out.endswith(b"\nlaunch-status=75\n")
  assert b"c is at" not in out
  assert other.poll() is None
  os.killpg(other.pid, signal.SIGTERM)
  assert other.wait(timeout=20) == 75
  assert {path.name[-1] for path in folder.glob("step-*")} == {"a", "c"}


def test_a_run_that_nobody_has_seen_ending_is_lost(cloud):
  """The machine has started again, say."""
  folder = cloud.folder / "shared"
  installed(cloud)
  first = start_worker(cloud, "a", folder, "wait", launch="1")
  wait_for(folder / "at-2-a")
  os.killpg(first.pid, signal.SIGKILL)
  first.communicate(timeout=20)
  again = start_worker(cloud, "b", folder, "wait", launch="1")
  out, _ = again.communicate(timeout=20)
  assert out.endswith(b"\nlaunch-status=69\n")
  assert not (folder / "step-b").exists()


def test_a_command_that_ends_as_ssh_does_is_started_once(cloud):
  """gcloud takes 255 for a broken connection."""
  installed(cloud)
  code = "import sys; print('starts'); sys.exit(-1)"
  result = launch(cloud, "run", "--", "python", "-c", code)
  assert result.returncode == 1
  assert result.stdout.count("starts") == 2
  assert "Retrying" not in result.stderr and "restart" not in result.stderr


def test_a_run_leaves_the_next_ones_pid_file(cloud):
  """So that the next one can be stopped, too; often, as it is about timing."""
  folder = cloud.folder / "shared"
  installed(cloud)
  tree = cloud.folder / "cloud" / "worker 0.0" / "vlp_jax"
  before = None
  for i in range(4):
    process = start_worker(cloud, f"{i}", folder, "wait", "late")
    wait_for(folder / f"at-2-{i}")
    if before:
      out, _ = before.communicate(timeout=20)
      assert out.endswith(b"\nlaunch-status=75\n")
      # It has ended before the next one began.
      ended = (folder / f"ended-{i - 1}").stat().st_mtime_ns
      assert ended < (folder / f"at-1-{i}").stat().st_mtime_ns
    time.sleep(0.2)
    pid = int((tree / ".launch.pid").read_text().split()[0])
    assert os.readlink(f"/proc/{pid}/cwd") == str(tree)
    before = process
  stop = ["bash", tree / "launch" / "worker.sh", "stop"]
  subprocess.run(stop, env=environ(), check=True, timeout=20)
  assert before.communicate(timeout=20)[0].endswith(b"launch-status=75\n")
  assert not (tree / ".launch.pid").exists()


def test_of_two_that_start_at_once_one_waits(cloud):
  """The lock is held before there is a pid to be seen, and until the end."""
  folder = cloud.folder / "shared"
  installed(cloud)
  tree = cloud.folder / "cloud" / "worker 0.0" / "vlp_jax"
  with open(tree / ".launch.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = start_worker(cloud, "0.0", folder)
    time.sleep(0.5)
    assert not folder.exists()
  wait_for(folder / "done-0.0")
  process.communicate(timeout=20)
  assert process.returncode == 0


def test_an_interrupt_has_the_workers_save(cloud):
  folder = cloud.folder / "shared"
  installed(cloud)
  process = subprocess.Popen(
    [
      *("bash", LAUNCH / "tpu_vm.sh", "run", *WHERE, "--poll=0"),
      *("--", "python", TOY, folder, "wait"),
    ],
    env=environ(STANDIN=str(cloud.folder / "cloud")),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    start_new_session=True,
    text=True,
    preexec_fn=heed_interrupts,
  )
  for worker in ("0.0", "0.1"):
    wait_for(folder / f"at-2-{worker}")
  os.killpg(process.pid, signal.SIGINT)  # as a terminal does
  _, err = process.communicate(timeout=20)
  assert process.returncode == 75
  assert "stopping the workers" in err and "restart" not in err
  result = launch(cloud, "run", "--", "python", TOY, folder, "wait")
  assert result.returncode == 0
  assert result.stdout.count("starts at 2") == 2


def test_what_is_there_is_not_made_twice(cloud):
  for _ in range(2):
    assert launch(cloud, "create").returncode == 0
  assert cloud.verbs(*QUEUED).count("create") == 1
  state = cloud.launch("tpu_vm.sh", "status", *WHERE)
  assert state.stdout.strip() == "ACTIVE"


def test_what_was_preempted_is_cleared_away(cloud):
  (cloud.folder / "cloud" / "state").write_text("SUSPENDED")
  assert launch(cloud, "create").returncode == 0
  asked = [v for v in cloud.verbs(*QUEUED) if v != "describe"]
  assert asked == ["delete", "create"]


def test_a_request_that_cannot_be_met_says_so(cloud):
  (cloud.folder / "cloud" / "next").write_text("FAILED")
  result = launch(cloud, "create")
  assert result.returncode == 1
  assert "is FAILED" in result.stderr


@pytest.mark.parametrize("setup", ["false || true", "true;", "true # why"])
def test_what_cannot_be_installed_is_not_run(cloud, setup):
  """With 2 of tar or uv as well, nothing of the user's must be mended."""
  cloud.write("uv", "2")
  result = launch(cloud, "all", f"--setup={setup}", "--", "python", TOY, "x")
  assert result.returncode == 1
  assert "must be mended" not in result.stderr
  assert "restart" not in result.stderr
  assert not result.stdout.count("starts")
  assert cloud.verbs(*QUEUED)[-1] == "delete"


@pytest.mark.parametrize("setup", ["true || false", "true;", "true # why"])
def test_a_setup_may_be_any_words_of_the_shell(cloud, setup):
  setup = f"echo 'a  b' >c; {setup}"
  assert launch(cloud, "create").returncode == 0
  assert launch(cloud, "install", f"--setup={setup}").returncode == 0
  written = cloud.folder / "cloud" / "worker 0.0" / "c"
  assert written.read_text() == "a  b\n"


def test_the_slices_are_given_back_when_installing_fails(cloud):
  result = launch(cloud, "all", "--setup=false", "--", "python", TOY, "x")
  assert result.returncode == 1
  assert cloud.verbs(*QUEUED)[-1] == "delete"
  assert not result.stdout.count("starts")
