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


def results(cloud):
  """Puts results on the first worker, and older ones where they go."""
  there = cloud.folder / "cloud" / "worker 0.0" / "runs"
  here = cloud.folder / "here"
  for runs, files in ((there, "ab"), (here / "runs", "bc")):
    runs.mkdir(parents=True)
    for name in files:
      (runs / name).write_text(runs.parent.name)
  return here


def test_what_was_not_copied_is_told(cloud):
  """Also if there is something of an earlier time."""
  installed(cloud)
  here = results(cloud)
  cloud.write("gone", "0")
  result = launch(cloud, "collect", "--from=runs", f"--to={here}")
  assert result.returncode == 1
  assert "nothing was copied" in result.stderr
  assert [path.name for path in here.iterdir()] == ["runs"]


@pytest.mark.parametrize("name", ["runs", "run*", "runs/*"])
def test_what_was_copied_is_put_in_its_place(cloud, name):
  """Whatever its name is; it is merged with what is there."""
  installed(cloud)
  here = results(cloud)
  result = launch(cloud, "collect", f"--from={name}", f"--to={here}")
  assert result.returncode == 0, result.stderr
  copied = here if "/" in name else here / "runs"
  assert (copied / "a").read_text() == "worker 0.0"
  assert (copied / "b").read_text() == "worker 0.0"
  assert (here / "runs" / "c").read_text() == "here"
  assert not list(here.glob(".collect*"))


def test_what_cannot_be_put_in_its_place_is_kept(cloud):
  """The slices may be deleted next."""
  installed(cloud)
  here = results(cloud)
  (here / "runs" / "a").mkdir()
  result = launch(cloud, "collect", "--from=runs", f"--to={here}")
  assert result.returncode == 1
  (fresh,) = here.glob(".collect*")
  assert f"what was copied is in {fresh}" in result.stderr
  assert (fresh / "runs" / "a").read_text() == "worker 0.0"


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


@pytest.mark.parametrize(
  "words",
  [
    "PERMISSION_DENIED: no such right",
    "Error parsing [queued_resource].",
    "The required property [project] is not currently set.",
    "You do not currently have an active account selected.",
    "Invalid choice: 'queued-resources'.",
  ],
)
def test_a_look_that_cannot_succeed_ends_at_once(cloud, words):
  cloud.write("errors", f"{ERROR}{words}\n" * 9)
  result = launch(cloud, "create")
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ") and words in line


def test_a_look_that_never_succeeds_ends(cloud):
  cloud.write("errors", f"{ERROR}what is this?\n" * 9)
  result = launch(cloud, "create")
  assert result.returncode == 1
  assert result.stderr.count("trying again") == 4
  assert result.stderr.splitlines()[-1].endswith(
    f"giving up: {ERROR}what is this?"
  )


def test_a_look_that_has_succeeded_may_fail_for_long(cloud):
  """So may one after a run: a worker has been reached."""
  folder = cloud.folder / "shared"
  installed(cloud)
  cloud.plan("term", folder / "at-2-0.0", folder / "at-2-0.1")
  cloud.write("errors", f"{ERROR}UNAVAILABLE: 503\n" * 9)
  result = launch(cloud, "run", "--", "python", TOY, folder, "wait")
  assert result.returncode == 0, result.stderr
  assert result.stderr.count("trying again") == 9


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


def test_what_was_installed_before_is_tried_again(cloud):
  folder = cloud.folder / "shared"
  installed(cloud)
  cloud.plan("suspend", folder / "at-2-0.0", folder / "at-2-0.1")
  once = "test -e once || { touch once; exit 2; }"
  end = (f"--setup={once}", "--", "python", TOY, folder, "wait")
  result = launch(cloud, "run", *end)
  assert result.returncode == 0, result.stderr
  assert result.stderr.count("the installation failed") == 1
  assert "restart 2 of at most 100" in result.stderr
  assert done(folder) == ["done-0.0", "done-0.1"]


def test_a_failure_of_some_while_others_are_silent_is_a_loss(cloud):
  """One machine is gone, and what the other says comes of that."""
  installed(cloud)
  homes = [cloud.folder / "cloud" / f"worker 0.{i}" for i in range(2)]
  cloud.plan("die", *(home / "vlp_jax" / "once" for home in homes))
  code = "[[ -e once ]] && exit 0; touch once;"
  code += " [[ $WORKER == 0.0 ]] && sleep 20; sleep 0.5; exit 1"
  result = launch(cloud, "run", "--", "bash", "-c", code)
  assert result.returncode == 0, result.stderr
  assert "1 of 2 workers have said how they ended" in result.stderr
  assert "is lost; restart 1 of at most 100" in result.stderr


@pytest.mark.parametrize(("status", "ends"), [(255, 1), (2, 2)])
def test_a_run_that_reaches_no_worker_ends(cloud, status, ends):
  """gcloud ends with 255 without a key, and with 2 at unknown flags."""
  installed(cloud)
  cloud.write("ssh", str(status))
  result = launch(cloud, "run", "--", "python", TOY, "x")
  assert result.returncode == ends
  assert "restart" not in result.stderr
  assert ("cannot reach any worker" in result.stderr) == (ends == 1)
  assert cloud.verbs(*QUEUED).count("ssh") == 1


@pytest.mark.parametrize("status", [69, 134, 137, 143])
def test_a_lost_process_is_started_again(cloud, status):
  """JAX has missed another one, and the queued resource is still there."""
  installed(cloud)
  once = f'[[ -e $HOME/once ]] || {{ touch "$HOME/once"; exit {status}; }}'
  command = ("--max_restarts=1", "--", "bash", "-c", once)
  result = launch(cloud, "run", *command)
  assert result.returncode == 0, result.stderr
  assert "is lost; restart 1 of at most 1" in result.stderr


@pytest.mark.parametrize(
  ("statuses", "worst"),
  [((75, 2), 2), ((69, 7), 7), ((69, 2), 2), ((137, 7), 7), ((143, 2), 2)],
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
