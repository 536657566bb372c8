#!/usr/bin/env python3
"""gcloud, xpk, sbatch, srun, scontrol, sky and uv, without a cloud.

Which one it is says the name that it is called by. State is in the folder
$STANDIN: `calls`, one JSON list of arguments a line; `state` of the queued
resource, `next`, that of one just asked for, and `later`, what `describe` finds
then, one a line; `errors`, lines that `describe` fails with first; `ssh`, the
status of a gcloud that reaches no worker; `uv`, that of its installations;
`gone`, the slices that are preempted, one a line; `plan` of one preemption,
lines HOW and FILES: once they are there, workers get SIGTERM ("term"), or die
and the queued resource is suspended ("suspend"), or is as before for now
("lag"); or the first worker dies and comes back ("die"), or its connection does
("break").
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

STATE = pathlib.Path(os.environ["STANDIN"])
NAME, ARGS = pathlib.Path(sys.argv[0]).name, sys.argv[1:]


def flags() -> dict[str, str]:
  """Reads --flag=value and --flag."""
  found = [a[2:].partition("=") for a in ARGS if a.startswith("--")]
  return {name: value for name, _, value in found}


def flags_of(*known: str) -> dict[str, str]:
  """As `flags`; one that the real command does not have is an error."""
  found = flags()
  unknown = set(found) - set(known)
  if unknown:
    sys.exit(f"{NAME}: unrecognized arguments: {unknown}")
  return found


def read(name: str, default: str = "") -> str:
  path = STATE / name
  return path.read_text() if path.exists() else default


def pop(name: str) -> str:
  """Takes the first line of a file of the state; nothing if there is none."""
  first, _, rest = read(name).partition("\n")
  (STATE / name).write_text(rest)
  return first


class Worker:
  """A command on a worker, and the connection to it."""

  def __init__(self, command: list[str], environ: dict):
    self.command, self.environ = command, environ
    self.lost, self.attempts = False, 0
    self.connect()

  def connect(self) -> None:
    """Starts the command."""
    home = pathlib.Path(self.environ.get("HOME", STATE))
    home.mkdir(parents=True, exist_ok=True)
    self.process = subprocess.Popen(
      self.command,
      cwd=home if "HOME" in self.environ else None,
      env={**os.environ, **self.environ},
      start_new_session=True,
      stdout=subprocess.PIPE,
    )
    self.connection = subprocess.Popen(["cat"], stdin=self.process.stdout)
    self.process.stdout.close()
    self.broken = False
    self.attempts += 1

  def disconnect(self) -> None:
    """Leaves the command to itself."""
    self.broken = True
    self.connection.kill()
    self.connection.wait()

  def kill(self, sign: int) -> None:
    """Signals the command, or all processes of a machine of gcloud's."""
    if NAME == "gcloud":
      os.killpg(self.process.pid, sign)
    else:
      self.process.send_signal(sign)
    self.lost = sign == signal.SIGKILL

  def status(self) -> int | None:
    """The status, if it has ended; 255 if the connection has."""
    if self.broken:
      return 255
    if self.process.poll() is None or self.connection.poll() is None:
      return None
    status = self.process.returncode
    if self.lost or (status < 0 and NAME == "gcloud"):
      return 255
    return status if status >= 0 else 128 - status

  def poll(self) -> int | None:
    """As `status`; gcloud first tries again what has ended with 255."""
    status = self.status()
    again = NAME == "gcloud" and not self.lost and self.attempts < 10
    if status != 255 or not again:
      return status
    print("Retrying: SSH command error", file=sys.stderr)
    return self.connect()


def preemption(workers: list[Worker]) -> None:
  """Carries out the plan if its time has come."""
  how, *triggers = read("plan").splitlines() or [""]
  if not how or not all(pathlib.Path(path).exists() for path in triggers):
    return
  (STATE / "plan").unlink()
  if how == "break":
    workers[0].disconnect()
    return
  if how == "suspend":
    (STATE / "state").write_text("SUSPENDED")
  elif how == "lag":
    (STATE / "gone").write_text("\n".join(map(str, range(slices()))))
  for worker in workers[:1] if how == "die" else workers:
    worker.kill(signal.SIGTERM if how == "term" else signal.SIGKILL)


def run_all(commands: list[list[str]], environs: list[dict]) -> list[int]:
  """Runs commands at the same time: their statuses, 255 where one is lost."""
  workers = [Worker(*each) for each in zip(commands, environs, strict=True)]
  while None in (statuses := [worker.poll() for worker in workers]):
    preemption(workers)
    time.sleep(0.01)
  return statuses


def slices() -> int:
  return int(read("slices", "1"))


def machines() -> list[pathlib.Path]:
  """The homes of all workers: two for each slice, as a v5p-16 has."""
  return [STATE / f"worker {s}.{w}" for s in range(slices()) for w in range(2)]


def ready() -> list[pathlib.Path]:
  """Those of slices that are ready: of others, gcloud warns, and no more."""
  gone = read("gone").split()
  if read("state") != "ACTIVE":
    gone = [str(number) for number in range(slices())]
  if gone:
    print(
      f"WARNING: Could not prepare all {slices()} nodes, attempting to ssh"
      " into the rest.",
      file=sys.stderr,
    )
  return [h for h in machines() if h.name.split()[1].split(".")[0] not in gone]


def not_found() -> int:
  print(f"ERROR: ({NAME}) NOT_FOUND: Resource was not found.", file=sys.stderr)
  return 1


def gcloud() -> int:
  assert ARGS[:3] == ["compute", "tpus", "queued-resources"], ARGS
  verb, *rest = ARGS[3:]
  where = ("zone", "project")
  state = read("state")
  if verb == "create":
    given = flags_of(
      *(*where, "accelerator-type", "runtime-version", "node-id", "spot"),
      *("node-count", "node-prefix"),
    )
    assert not state, "it exists already"
    (STATE / "slices").write_text(given.get("node-count", "1"))
    (STATE / "gone").unlink(missing_ok=True)
    (STATE / "state").write_text(read("next", "WAITING_FOR_RESOURCES"))
  elif verb == "describe":
    flags_of(*where, "format")
    if error := pop("errors"):
      print(error, file=sys.stderr)
      return 1
    if not state:
      return not_found()
    print(state)
    later = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}
    (STATE / "state").write_text(pop("later") or later.get(state, state))
  elif verb == "delete":
    flags_of(*where, "force", "quiet")
    (STATE / "state").unlink()
    for home in machines():
      shutil.rmtree(home, ignore_errors=True)
  elif not state:
    return not_found()
  elif verb == "scp":
    flags_of(*where, "node", "worker", "recurse")
    source, target = (a for a in rest if not a.startswith("--"))
    if ":" in target and target.endswith(".gz"):
      for home in ready():
        home.mkdir(exist_ok=True)
        shutil.copy(source, home / target.partition(":")[2])
    elif homes := ready():
      found = sorted(homes[0].glob(source.partition(":")[2]))
      for path in found:
        copied = pathlib.Path(target) / path.name
        if path.is_dir():
          shutil.copytree(path, copied, dirs_exist_ok=True)
        else:
          shutil.copy(path, copied)
      return 0 if found else 1
  elif verb == "ssh":
    given = flags_of(*where, "node", "worker", "command")
    if status := read("ssh"):
      return int(status)
    homes = ready()
    statuses = run_all(
      [["bash", "-c", given["command"]] for _ in homes],
      [{"HOME": str(h), "WORKER": h.name[-3:]} for h in homes],
    )
    return next((status for status in statuses if status), 0)
  return 0


def xpk() -> int:
  where = ("cluster", "zone", "project")
  if ARGS[:2] == ["workload", "create"]:
    given = flags_of(
      *(*where, "workload", "tpu-type", "num-slices", "docker-image", "env"),
      *("max-restarts", "restart-on-exit-codes", "command", "storage"),
      "termination-grace-period-seconds",
    )
    settings = [a.removeprefix("--env=") for a in ARGS if a[:6] == "--env="]
    environ = dict(setting.split("=", 1) for setting in settings)
    # As xpk's container has it.
    script = f"({given['command']}) & PID=$!; trap 'kill -TERM $PID' TERM; "
    script += "while kill -0 $PID 2>/dev/null; do sleep 0.05; done; wait $PID"
    # xpk's, and those that are asked for; any other fails the job, and with it
    # the JobSet, whatever the other pods ended with.
    again = {42, *range(127, 256)}
    again |= {int(code) for code in given["restart-on-exit-codes"].split(",")}
    for _ in range(1 + int(given["max-restarts"])):
      statuses = run_all(
        [["bash", "-c", script]] * 2, [{**environ, "WORKER": w} for w in "01"]
      )
      failures = set(statuses) - {0}
      if not failures or failures - again:
        break
    (STATE / "workload").write_text(str(max(statuses)))
  elif ARGS[:2] == ["workload", "list"]:
    given = flags_of(*where, "wait-for-job-completion")
    return 125 if read("workload", "0") != "0" else 0
  else:
    flags_of(
      *(*where, "tpu-type", "num-slices", "on-demand", "spot", "reservation"),
      *("workload", "force"),
    )
  return 0


def sbatch() -> int:
  at = next(i for i, arg in enumerate(ARGS) if not arg.startswith("--"))
  script = pathlib.Path(ARGS[at])
  given = dict(
    re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.M)
  )
  given |= {k: v for k, _, v in (a[2:].partition("=") for a in ARGS[:at])}
  spool = STATE / "spool"
  shutil.copy(script, spool)
  tasks = int(given["nodes"]) * int(given["ntasks-per-node"])
  assert given["signal"].startswith("TERM@") and given["requeue"] == ""
  print("Submitted batch job 7")
  for restarts in range(9):
    environ = dict(SLURM_JOB_ID="7", SLURM_NTASKS=str(tasks))
    environ["SLURM_CPUS_PER_TASK"] = given["cpus-per-task"]
    environ["SLURM_RESTART_COUNT"] = str(restarts)
    with open("slurm-7.out", "a") as log:
      status = subprocess.run(
        ["bash", spool, *ARGS[at + 1 :]],
        env={**os.environ, **environ},
        stdout=log,
        stderr=log,
      ).returncode
    if not read("requeue"):
      break
    (STATE / "requeue").unlink()
  (STATE / "job").write_text(str(status))
  return 0


def srun() -> int:
  assert re.fullmatch(r"--wait=\d+", ARGS[0]), ARGS
  tasks = range(int(os.environ["SLURM_NTASKS"]))
  statuses = run_all(
    [ARGS[1:]] * len(tasks), [{"SLURM_PROCID": str(i)} for i in tasks]
  )
  for i, status in enumerate(statuses):
    if status:
      how = f"Exited with exit code {status}"
      if status > 128:  # by a signal
        how = signal.strsignal(status - 128) or how
      print(f"srun: error: node: task {i}: {how}", file=sys.stderr)
  return max(statuses)


def scontrol() -> int:
  assert ARGS == ["requeue", "7"], ARGS
  (STATE / "requeue").write_text("yes")
  return 0


def sky() -> int:
  import yaml

  if ARGS[:2] != ["jobs", "launch"]:
    return 0
  flags_of("yes", "name", "gpus", "infra", "use-spot", "env")
  settings = [a.removeprefix("--env=") for a in ARGS if a[:6] == "--env="]
  environ = dict(setting.split("=", 1) for setting in settings)
  task = yaml.safe_load(pathlib.Path(ARGS[-1]).read_text())
  assert set(environ) == set(task["envs"])
  recovery = task["resources"]["job_recovery"]
  for _ in range(9):
    steps = [task["setup"], task["run"]]
    for step in steps:
      (status,) = run_all(
        [["bash", "-c", step]], [{**environ, "WORKER": "sky"}]
      )
      if status:
        break
    if status not in recovery["recover_on_exit_codes"]:
      break
  return status


def uv() -> int:
  if ARGS[0] == "venv":
    folder = pathlib.Path(ARGS[-1]) / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "python").exists():
      (folder / "python").symlink_to(sys.executable)
    return 0
  return int(read("uv", "0"))


if __name__ == "__main__":
  with open(STATE / "calls", "a") as calls:
    calls.write(json.dumps([NAME, *ARGS]) + "\n")
  sys.exit(globals()[NAME]())
