"""Runs launch scripts against stand-ins for what they call."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
TOY = HERE / "toy.py"


def environ(**more: str) -> dict[str, str]:
  """The environment, with this Python first and without a cluster's."""
  python = pathlib.Path(sys.executable).parent
  path = f"{HERE / 'bin'}:{python}:{os.environ['PATH']}"
  return {**without_cluster(os.environ), "PATH": path, **more}


def without_cluster(env) -> dict[str, str]:
  """An environment without what a job of a cluster, if this is one, has set."""
  told = re.compile(r"SLURM_|SRUN_|SBATCH_|JAX_(COORD|NUM_|PROC)|WORKER$")
  return {name: value for name, value in env.items() if not told.match(name)}


def heed_interrupts() -> None:
  """Has a process hear SIGINT, which what runs in the background may ignore."""
  signal.signal(signal.SIGINT, signal.default_int_handler)


def launch(script: str, *args, cwd=None, **env: str):
  """Runs a script of launch/ to its end."""
  return subprocess.run(
    ["bash", LAUNCH / script, *map(str, args)],
    env=environ(**env),
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=120,
  )


def wait_for(path: pathlib.Path) -> None:
  """Waits until a file is there, for at most 20 s."""
  until = time.monotonic() + 20
  while not path.exists():
    assert time.monotonic() < until, path
    time.sleep(0.01)


@dataclasses.dataclass
class Cloud:
  """The stand-ins' state, and what was asked of them."""

  folder: pathlib.Path

  def launch(self, script: str, *args):
    """Runs a script with the stand-ins on the PATH."""
    return launch(
      script, *args, cwd=self.folder, STANDIN=str(self.folder / "cloud")
    )

  def plan(self, how: str, *triggers: pathlib.Path) -> None:
    """Preempts once, as soon as files are there: standins.py says how."""
    plan = "\n".join([how, *map(str, triggers)])
    (self.folder / "cloud" / "plan").write_text(plan)

  def write(self, name: str, text: str) -> None:
    """Sets a file of the stand-ins' state."""
    (self.folder / "cloud" / name).write_text(text)

  @property
  def calls(self) -> list[list[str]]:
    """All calls of the stand-ins, as lists of arguments."""
    path = self.folder / "cloud" / "calls"
    if not path.exists():
      return []
    return [json.loads(line) for line in path.read_text().splitlines()]

  def verbs(self, *leading: str) -> list[str]:
    """What was asked of one program: the word behind `leading`."""
    return [
      call[len(leading)]
      for call in self.calls
      if tuple(call[: len(leading)]) == leading
    ]
