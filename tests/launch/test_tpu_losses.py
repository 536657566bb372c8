"""Cloud TPU VMs: machines that are lost while things say otherwise."""

import pytest

from tests.launch.test_tpu_vm import QUEUED, done, installed, launch
from tests.launch.tools import TOY

ERROR = "ERROR: (gcloud.compute.tpus.queued-resources.describe) "


def test_a_run_on_no_worker_is_not_done(cloud):
  """gcloud ends with 0 if no slice is ready; the state says so only later."""
  folder = cloud.folder / "shared"
  installed(cloud)
  cloud.plan("lag", folder / "at-2-0.0", folder / "at-2-0.1")
  cloud.write("later", "ACTIVE\nSUSPENDED\n")
  result = launch(cloud, "run", "--spot", "--", "python", TOY, folder, "wait")
  assert result.returncode == 0, result.stderr
  assert "0 of 2 workers have said how they ended" in result.stderr
  assert done(folder) == ["done-0.0", "done-0.1"]
  assert cloud.verbs(*QUEUED).count("create") == 1


def test_a_run_on_some_workers_is_not_done(cloud):
  """Of two slices one is gone: the other must not train by itself and end."""
  folder = cloud.folder / "shared"
  more = ("--num_slices=2", "--max_restarts=0")
  assert launch(cloud, "create", *more).returncode == 0
  assert launch(cloud, "install", *more).returncode == 0
  cloud.write("gone", "1")
  result = launch(cloud, "run", *more, "--", "python", TOY, folder)
  assert result.returncode == 69
  assert "2 of 4 workers have said how they ended" in result.stderr


def test_an_installation_on_no_worker_is_told(cloud):
  assert launch(cloud, "create").returncode == 0
  cloud.write("gone", "0")
  result = launch(cloud, "install")
  assert result.returncode == 255
  assert "0 of 2 workers" in result.stderr


def test_what_was_not_copied_is_told(cloud):
  installed(cloud)
  cloud.write("gone", "0")
  to = f"--to={cloud.folder / 'here'}"
  result = launch(cloud, "collect", "--from=results", to)
  assert result.returncode == 1
  assert "nothing was copied" in result.stderr


@pytest.mark.parametrize("action", ["create", "all"])
def test_a_look_that_fails_is_no_loss(cloud, action):
  """Only NOT_FOUND says that it is gone; it would be asked for twice."""
  folder = cloud.folder / "shared"
  assert launch(cloud, "create").returncode == 0
  cloud.write("errors", f"{ERROR}UNAVAILABLE: 503\n{ERROR}no route to host\n")
  end = ("--", "python", TOY, folder)
  result = launch(cloud, action, *(end if action == "all" else ()))
  assert result.returncode == 0, result.stderr
  assert result.stderr.count("trying again: ERROR") == 2
  assert cloud.verbs(*QUEUED).count("create") == 1


@pytest.mark.parametrize(
  "words", ["NOT_FOUND: Resource", "Queuedresource [a run] not found: Resource"]
)
def test_what_is_not_found_is_made(cloud, words):
  cloud.write("errors", f"{ERROR}{words} was not found.\n")
  result = launch(cloud, "create")
  assert result.returncode == 0, result.stderr
  assert "trying again" not in result.stderr
  assert cloud.verbs(*QUEUED).index("create") == 1


def test_a_look_that_is_denied_ends_at_once(cloud):
  cloud.write("errors", f"{ERROR}PERMISSION_DENIED: no such right\n")
  result = launch(cloud, "create")
  assert result.returncode == 2
  assert "no such right" in result.stderr


def test_a_slice_that_is_taken_while_it_is_made_is_made_again(cloud):
  """Once while waiting, and once while installing."""
  folder = cloud.folder / "shared"
  cloud.write("later", "PROVISIONING\nSUSPENDED\n")
  worker = cloud.folder / "cloud" / "worker 0.0" / "vlp_jax" / "launch"
  cloud.plan("suspend", worker / "worker.sh")
  once = f"test -e '{cloud.folder}/once' || touch '{cloud.folder}/once'"
  result = launch(
    cloud,
    "all",
    f"--setup={once}; sleep 0.3",
    *("--", "python", TOY, folder),
  )
  assert result.returncode == 0, result.stderr
  assert "restart 2 of at most 100" in result.stderr
  assert cloud.verbs(*QUEUED).count("create") == 3
  assert done(folder) == ["done-0.0", "done-0.1"]


def test_the_restarts_of_making_are_counted(cloud):
  cloud.write("next", "SUSPENDED")
  end = ("--max_restarts=2", "--", "python", TOY, "x")
  result = launch(cloud, "all", *end)
  assert result.returncode == 75
  assert cloud.verbs(*QUEUED).count("create") == 3
  assert cloud.verbs(*QUEUED)[-1] == "delete"


@pytest.mark.parametrize("status", [69, 134])
def test_a_lost_process_is_started_again(cloud, status):
  """JAX has missed another one, and the queued resource is still there."""
  installed(cloud)
  once = f'[[ -e $HOME/once ]] || {{ touch "$HOME/once"; exit {status}; }}'
  command = ("--max_restarts=1", "--", "bash", "-c", once)
  result = launch(cloud, "run", *command)
  assert result.returncode == 0, result.stderr
  assert "is lost; restart 1 of at most 1" in result.stderr


@pytest.mark.parametrize(
  ("statuses", "worst"), [((75, 2), 2), ((69, 7), 7), ((69, 2), 2)]
)
def test_what_is_no_loss_ends_the_run(cloud, statuses, worst):
  """The one that fails says why the others have missed it."""
  installed(cloud)
  code = f"[[ $WORKER == 0.0 ]] && exit {statuses[0]}; exit {statuses[1]}"
  result = launch(cloud, "run", "--", "bash", "-c", code)
  assert result.returncode == worst
  assert "restart" not in result.stderr


@pytest.mark.parametrize(
  ("accelerator", "slices", "workers"),
  [("v6e-256", 2, 128), ("v5p-16", 33, 66), ("v4-1024", 1, 128)],
)
def test_too_many_workers_are_refused(cloud, accelerator, slices, workers):
  more = (f"--accelerator={accelerator}", f"--num_slices={slices}")
  result = launch(cloud, "create", *more)
  assert result.returncode == 2
  assert f"error: {workers} workers" in result.stderr
  assert not cloud.calls


@pytest.mark.parametrize(
  "accelerator", ["v6e-256", "v5litepod-8", "v5p-512", "v3-32"]
)
def test_as_many_workers_as_are_started_at_once_are_not(cloud, accelerator):
  more = (f"--accelerator={accelerator}", "--dry_run")
  assert launch(cloud, "create", *more).returncode == 0
