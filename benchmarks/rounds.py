"""Contenders that take turns: what comparisons in one run have in common.

Each contender has processes of its own, which are stopped while another one
works: no thread spins, and nothing is made ahead in another's time. Ratios are
taken within each round, so that what slows the machine down for a while
touches both sides.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).with_name("results")


def parser(benchmark: str, doc: str) -> argparse.ArgumentParser:
  """What the command lines of benchmarks that `keep` records have in common."""
  found = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  found.add_argument(
    "--output", type=pathlib.Path, default=RESULTS / f"{benchmark}.jsonl"
  )
  return found


class Worker:
  """One contender: a process that takes numbers of steps, and times them.

  It runs only between `wake` and `rest`, and so do the processes it starts.
  """

  def __init__(self, module: str, name: str, environ: Mapping[str, str]):
    """Starts `python -m module <the command's arguments> --worker=name`."""
    self.process = subprocess.Popen(
      [sys.executable, "-m", module, *sys.argv[1:], f"--worker={name}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=dict(environ),
      start_new_session=True,  # its signals reach what it starts
    )
    self.facts = self._read()
    self.rest()

  def time(self, steps: int) -> float:
    """Lets it run steps; returns their seconds."""
    self.wake()
    self.process.stdin.write(f"{steps}\n")
    self.process.stdin.flush()
    seconds = self._read()
    self.rest()
    return seconds

  def wake(self) -> None:
    os.killpg(self.process.pid, signal.SIGCONT)

  def rest(self) -> None:
    os.killpg(self.process.pid, signal.SIGSTOP)

  def close(self) -> None:
    """Ends it, whatever it does."""
    os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()

  def _read(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"a process ended: {' '.join(self.process.args)}")
    return json.loads(line)


def compare(
  names: Sequence[str],
  start: Callable[[str], Worker],
  rounds: int,
  steps: int,
) -> tuple[dict, dict[str, list[float]]]:
  """Lets all contenders work in turn.

  Returns:
    What each says of itself, and its seconds a step in each round.
  """
  workers: dict[str, Worker] = {}
  seconds: dict[str, list[float]] = {name: [] for name in names}
  try:
    for name in names:  # one compiles at a time
      workers[name] = start(name)
    for round_number in range(rounds):
      # The order changes, so that none always follows the same one.
      for name in names if round_number % 2 == 0 else names[::-1]:
        seconds[name].append(workers[name].time(steps) / steps)
  finally:
    for worker in workers.values():
      worker.close()
  return {name: worker.facts for name, worker in workers.items()}, seconds


def serve(facts: dict, run: Callable[[int], object], lead: int = 1) -> None:
  """A contender's side: says what it is, then runs steps as it is asked to.

  Args:
    facts: what it is.
    run: runs so many steps.
    lead: steps that run before those that count. What was made ahead is used
      up in them, and memory is there again that a virtual machine's host took
      back meanwhile.
  """
  print(json.dumps(facts), flush=True)
  for line in sys.stdin:
    run(lead)
    begin = time.perf_counter()
    run(int(line))
    print(json.dumps(time.perf_counter() - begin), flush=True)


def ratios(
  wanted: Mapping[str, tuple[str, str, str]],
  seconds: Mapping[str, Sequence[float]],
) -> dict[str, dict]:
  """Returns ratios of seconds, by round.

  Args:
    wanted: name to numerator, denominator and what is aimed at, as text.
    seconds: by contender; ratios of those that are absent are left out.
  """
  found = {}
  for name, (top, bottom, aim) in wanted.items():
    if top in seconds and bottom in seconds:
      pairs = zip(seconds[top], seconds[bottom], strict=True)
      values = sorted(a / b for a, b in pairs)
      found[name] = dict(
        median=statistics.median(values),
        least=values[0],
        greatest=values[-1],
        aim=aim,
      )
  return found


def record(
  benchmark: str, packages: Sequence[str], facts: Mapping[str, object]
) -> dict:
  """Returns a record of a run: what, when, where, and `facts`."""
  now = datetime.datetime.now(datetime.UTC)
  return dict(
    benchmark=benchmark,
    time=now.isoformat(timespec="seconds"),
    command=" ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
    machine=machine(packages),
    **facts,
  )


def machine(packages: Sequence[str]) -> dict:
  """Returns the processor, the cores, the load, and versions of packages."""
  versions = {"python": platform.python_version()}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  cpu = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = info.read_text().splitlines()
    models = [x.split(":")[1].strip() for x in lines if "model name" in x]
    cpu = models[0] if models else cpu
  return dict(
    cpu=cpu, cores=cores(), load=os.getloadavg()[0], versions=versions
  )


def cores() -> int:
  return len(os.sched_getaffinity(0))


def show_machine(found: dict) -> None:
  versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
  print(f"{found['cpu']}, {found['cores']} cores; {versions}")


def show_ratios(found: Mapping[str, dict]) -> None:
  for name, ratio in found.items():
    aim = f"   (aim: {ratio['aim']})" if ratio["aim"] else ""
    print(
      f"{name:32}{ratio['median']:6.2f} "
      f"[{ratio['least']:.2f}, {ratio['greatest']:.2f}]{aim}"
    )


def show_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
  """Prints a table in Markdown."""
  for line in (heads, ["---"] * len(heads), *lines):
    print("| " + " | ".join(line) + " |")


def once(path: pathlib.Path, of: str, make: Callable[[], object]) -> Any:
  """Reads JSON from a file; where it is not there, makes and writes it first.

  A file is there whole or not at all, whenever the process is killed.

  Args:
    path: of the file.
    of: what it is made of: what was made of something else is made again.
    make: makes it.
  """
  if path.exists():
    kept = json.loads(path.read_text())
    if kept.get("of") == of:
      return kept["found"]
    print(f"  again: {path} is of {kept.get('of')}", flush=True)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps({"of": of, "found": make()}, indent=2) + "\n")
  partial.rename(path)
  return once(path, of, make)


def with_versions(what: str) -> str:
  """What is compiled, and by which compiler; the code itself is not in it."""
  versions = machine(("jax", "libtpu"))["versions"]
  return ", ".join([what, *(f"{k} {v}" for k, v in versions.items())])


def keep(found: dict, path: pathlib.Path) -> None:
  """Adds a record to a file, a line of JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    file.write(json.dumps(found) + "\n")
