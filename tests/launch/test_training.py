"""launch/local.sh trains: two processes, one preemption, the same bits."""

import re
import subprocess
import time

import pytest

from tests.e2e import commands
from tests.launch.tools import LAUNCH, environ, without_cluster


def start(workdir, *flags):
  return subprocess.Popen(
    [
      *("bash", LAUNCH / "local.sh", "2", *flags),
      *("--", "python", "-m", "vlp_jax.main"),
      *("--config=configs/clip.py:debug", f"--workdir={workdir}"),
      *commands.SMALL,
      "--config.total_steps=8",
      *commands.no_evaluations("configs/clip.py:debug"),
    ],
    cwd=workdir.parent,
    env=without_cluster(commands.environ(PATH=environ()["PATH"])),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_a_preempted_run_ends_with_the_same_bits(tmp_path):
  undisturbed = start(tmp_path / "one")
  _, err = undisturbed.communicate(timeout=600)
  assert undisturbed.returncode == 0, err

  process = start(tmp_path / "two", "--max_restarts=1")
  pid = re.search(r"pid (\d+)", process.stderr.readline())[1]
  log = tmp_path / "two" / "metrics.jsonl"
  until = time.monotonic() + 300
  while not log.exists() or log.read_text().count("\n") < 2:
    assert time.monotonic() < until and process.poll() is None
    time.sleep(0.05)
  subprocess.run(["kill", "-TERM", pid], check=True)  # one of the two
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  assert "restart 1 of at most 1" in err
  one, two = (commands.results(tmp_path / n) for n in ("one", "two"))
  assert one["step"] == two["step"] == 8
  assert one["params_sha256"] == two["params_sha256"]
