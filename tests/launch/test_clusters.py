"""GKE, Slurm and SkyPilot: preempted once, and run to the end."""

import pytest

from tests.launch.tools import TOY

GKE = ("--cluster=a", "--zone=us-east5-b", "--accelerator=v6e-16")
COMMANDS = {
  "gke_xpk.sh": ("run", *GKE, "--name=run", "--image=gcr.io/p/vlp_jax"),
  "slurm.sh": ("--name=run", "--gpus_per_node=2", "--time=1:00:00"),
  "skypilot.sh": ("run", "--name=run", "--bucket=gs://b", "--spot"),
}
WHO = {
  "gke_xpk.sh": ["0", "1"],
  "slurm.sh": ["0", "1"],
  "skypilot.sh": ["sky"],
}


def launch(cloud, script, *end):
  result = cloud.launch(script, *COMMANDS[script], "--", "python", TOY, *end)
  log = cloud.folder / "slurm-7.out"
  out = log.read_text() if log.exists() else result.stdout
  job = cloud.folder / "cloud" / "job"
  status = int(job.read_text()) if job.exists() else result.returncode
  return status, out


@pytest.mark.parametrize("script", COMMANDS)
def test_a_preempted_run_goes_on(cloud, script):
  folder = cloud.folder / "a run"
  cloud.plan("term", *(folder / f"at-2-{who}" for who in WHO[script]))
  status, out = launch(cloud, script, folder, "wait")
  assert status == 0, out
  done = sorted(path.name for path in folder.glob("done-*"))
  assert done == [f"done-{who}" for who in WHO[script]]
  assert out.count("starts at 2") == len(WHO[script])


@pytest.mark.parametrize("script", COMMANDS)
def test_a_mistake_ends_the_run_at_once(cloud, script):
  status, out = launch(cloud, script, "x", "mistake")
  assert status in (2, 125)
  assert out.count("starts at") == len(WHO[script])


@pytest.mark.parametrize("script", ["gke_xpk.sh", "slurm.sh"])
def test_a_run_that_has_lost_a_process_goes_on(cloud, script):
  status, out = launch(cloud, script, cloud.folder / "a run", "lost")
  assert status == 0, out
  assert out.count("starts at 1") == 2


@pytest.mark.parametrize("script", ["gke_xpk.sh", "slurm.sh"])
@pytest.mark.parametrize("sign", ["ABRT", "KILL", "TERM"])
def test_a_run_that_was_killed_goes_on(cloud, script, sign):
  code = 'echo "starts at"; [[ ${WORKER:-$SLURM_PROCID} == 1 ]] || exit 0;'
  code += f" [[ -e once ]] || {{ touch once; kill -{sign} $$; }}"
  end = ("--", "bash", "-c", code)
  result = cloud.launch(script, *COMMANDS[script], *end)
  assert result.returncode == 0
  job = cloud.folder / "cloud" / "job"
  assert not job.exists() or job.read_text() == "0"
  log = cloud.folder / "slurm-7.out"
  out = log.read_text() if log.exists() else result.stdout
  assert out.count("starts at") == 4


@pytest.mark.parametrize("script", ["gke_xpk.sh", "slurm.sh"])
@pytest.mark.parametrize("other", [1, 2])
@pytest.mark.parametrize("loss", ["exit 69", "kill -KILL $$"])
def test_a_failure_that_others_miss_ends_the_run(cloud, script, other, loss):
  """The others end as after a loss; a restart would fail in the same way."""
  code = 'echo "starts at"; [[ ${WORKER:-$SLURM_PROCID} == 1 ]] && '
  code += f"exit {other}; {loss}"
  command = ("--", "bash", "-c", code)
  result = cloud.launch(script, *COMMANDS[script], *command)
  if script == "slurm.sh":
    assert (cloud.folder / "cloud" / "job").read_text() == str(other)
    log = (cloud.folder / "slurm-7.out").read_text()
  else:
    assert result.returncode == 125
    log = result.stdout
  assert log.count("starts at") == 2


def test_slurm_queues_again_so_often_only(cloud):
  folder = cloud.folder / "a run"
  cloud.plan("term", folder / "at-2-0")
  end = ("--max_restarts=0", "--", "python", TOY, folder, "wait")
  assert cloud.launch("slurm.sh", *COMMANDS["slurm.sh"], *end).returncode == 0
  assert (cloud.folder / "cloud" / "job").read_text() == "75"
  assert ["scontrol", "requeue", "7"] not in cloud.calls


def test_a_gke_cluster_is_made_and_deleted(cloud):
  assert cloud.launch("gke_xpk.sh", "create", *GKE, "--spot").returncode == 0
  assert cloud.launch("gke_xpk.sh", "status", *GKE).returncode == 0
  cancelled = cloud.launch("gke_xpk.sh", "cancel", *GKE, "--name=run")
  assert cancelled.returncode == 0
  assert cloud.launch("gke_xpk.sh", "delete", *GKE).returncode == 0
  assert cloud.verbs("xpk", "cluster") == ["create", "delete"]
  assert cloud.verbs("xpk", "workload") == ["list", "delete"]
  reserved = cloud.launch("gke_xpk.sh", "create", *GKE, "--reservation=r")
  assert reserved.returncode == 0
  assert cloud.calls[0][-1] == "--spot"
  assert cloud.calls[-1][-1] == "--reservation=r"


@pytest.mark.parametrize("action", ["status", "logs", "cancel"])
def test_a_job_of_skypilot_is_watched(cloud, action):
  assert cloud.launch("skypilot.sh", action, "--name=a b").returncode == 0
  verb = {"status": "queue"}.get(action, action)
  assert cloud.verbs("sky", "jobs") == [verb]
