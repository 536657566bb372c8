"""launch/local.sh: several processes of one command, here."""

import re
import signal
import subprocess

import pytest

from tests.launch.tools import (
  LAUNCH,
  TOY,
  environ,
  heed_interrupts,
  launch,
  wait_for,
)


def done(folder):
  return sorted(path.name for path in folder.glob("done-*"))


def test_three_processes(tmp_path):
  folder = tmp_path / "a run"
  result = launch("local.sh", 3, "--", "python", TOY, folder)
  assert result.returncode == 0
  assert done(folder) == ["done-0", "done-1", "done-2"]
  lines = sorted(li for li in result.stdout.splitlines() if "starts" in li)
  assert [line[:14] for line in lines] == [
    f"[{i}] {i} starts at"[:14] for i in range(3)
  ]


def test_what_a_process_is_told(tmp_path):
  script = "import os; print(*(os.environ[n] for n in ("
  script += "'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID',"
  script += "'JAX_NUM_CPU_DEVICES', 'JAX_PLATFORMS')))"
  result = launch("local.sh", 2, "--devices=4", "--", "python", "-c", script)
  found = [line.split() for line in sorted(result.stdout.splitlines())]
  assert [line[0] for line in found] == ["[0]", "[1]"]
  assert [line[2:] for line in found] == [
    ["2", "0", "4", "cpu"],
    ["2", "1", "4", "cpu"],
  ]
  assert found[0][1] == found[1][1]
  assert re.fullmatch(r"localhost:\d+", found[0][1])


def test_a_cluster_around_is_not_heard(tmp_path, monkeypatch):
  """Or these tests would fail inside a job of Slurm."""
  monkeypatch.setenv("SLURM_PROCID", "5")
  monkeypatch.setenv("JAX_PROCESS_ID", "6")
  command = ["python", str(TOY), str(tmp_path)]
  subprocess.run(command, env=environ(WORKER="w"), check=True)
  assert done(tmp_path) == ["done-w"]


def test_processes_that_were_lost_start_again(tmp_path):
  end = ("--", "python", TOY, tmp_path, "lost")
  result = launch("local.sh", 2, "--max_restarts=1", *end)
  assert result.returncode == 0
  assert "a process is lost; restart 1 of at most 1" in result.stderr
  assert len(done(tmp_path)) == 2


@pytest.mark.parametrize("sign", ["ABRT", "KILL", "TERM"])
def test_processes_that_were_killed_start_again(tmp_path, sign):
  once = f"[[ -e $0 ]] || {{ touch $0; kill -{sign} $$; }}"
  end = ("--", "bash", "-c", once, tmp_path / "once")
  result = launch("local.sh", 1, "--max_restarts=1", *end)
  assert result.returncode == 0
  assert "a process is lost; restart 1 of at most 1" in result.stderr


def test_a_failure_comes_before_a_loss(tmp_path):
  code = "import os, sys; i = int(os.environ['JAX_PROCESS_ID']);"
  code += "import time; time.sleep(0.5 * i); sys.exit((69, 7)[i])"
  end = ("--max_restarts=5", "--", "python", "-c", code)
  result = launch("local.sh", 2, *end)
  assert result.returncode == 7
  assert "restart" not in result.stderr


def test_one_that_dies_takes_the_others_along(tmp_path):
  end = ("--grace=1", "--", "python", TOY, tmp_path, "crash")
  result = launch("local.sh", 3, *end)
  # The others have saved themselves, but only since they were told to.
  assert result.returncode == 7
  assert "process 1 ended with status 7" in result.stderr
  assert not done(tmp_path)


def test_a_mistake_comes_before_all_else(tmp_path):
  code = (
    "import os, sys; sys.exit((75, 2, 1)[int(os.environ['JAX_PROCESS_ID'])])"
  )
  end = ("--max_restarts=5", "--", "python", "-c", code)
  result = launch("local.sh", 3, *end)
  assert result.returncode == 2
  assert "restart" not in result.stderr


def start(*args, **env):
  return subprocess.Popen(
    ["bash", LAUNCH / "local.sh", *map(str, args)],
    env=environ(**env),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=heed_interrupts,
  )


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all(tmp_path, sign):
  end = ("--max_restarts=5", "--", "python", TOY, tmp_path, "wait")
  process = start(2, *end)
  for i in range(2):
    wait_for(tmp_path / f"at-2-{i}")
  process.send_signal(sign)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 75
  assert "restart" not in err and not done(tmp_path)
  again = launch("local.sh", 2, "--", "python", TOY, tmp_path, "wait")
  assert again.returncode == 0 and len(done(tmp_path)) == 2
  assert again.stdout.count("starts at 2") == 2


def test_a_signal_that_comes_before_the_processes(tmp_path):
  """While the port is looked for, there is nothing yet to pass it on to."""
  (tmp_path / "bin").mkdir()
  slow = tmp_path / "bin" / "python3"
  slow.write_text(f"#!/bin/sh\ntouch '{tmp_path}/looks'\nsleep 1\necho 1\n")
  slow.chmod(0o755)
  path = f"{tmp_path / 'bin'}:{environ()['PATH']}"
  process = start(2, "--", "sleep", "15", PATH=path)
  wait_for(tmp_path / "looks")
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=10)
  assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("most", [0, 1])
def test_preempted_processes_start_again(tmp_path, most):
  end = (f"--max_restarts={most}", "--", "python", TOY, tmp_path, "wait")
  process = start(2, *end)
  for i in range(2):
    wait_for(tmp_path / f"at-2-{i}")
    line = process.stderr.readline()
    pid = int(re.fullmatch(rf"launch: process {i} has pid (\d+)\n", line)[1])
    subprocess.run(["kill", "-TERM", str(pid)], check=True)
  _, err = process.communicate(timeout=20)
  assert process.returncode == (0 if most else 75)
  assert f"--max_restarts={most} is reached" in err or most
  assert len(done(tmp_path)) == 2 * most
