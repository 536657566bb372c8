"""Runs the commands as a user would: in processes of their own."""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from unittest import mock

from tests import toys
from vlp_jax import command
from vlp_jax import config as config_lib

# Programs that one run has compiled, the next one takes from here.
_CACHE = tempfile.TemporaryDirectory()

# Small enough that a run takes seconds once it is compiled.
SMALL = [
  "--config.total_steps=6",
  "--config.schedule.warmup_steps=2",
  "--config.checkpoint.every_steps=2",
  "--config.log.every_steps=1",
]


@functools.cache
def _xla_flags() -> str:
  """Has XLA compile fast; the numbers of two runs stay comparable."""
  options = toys.compiler_options()
  return " ".join(f"--{k}={str(v).lower()}" for k, v in options.items())


def wait_until_sigterm_is_caught(process: subprocess.Popen) -> None:
  """Returns when Python and the command have begun; both take a moment."""
  status = pathlib.Path(f"/proc/{process.pid}/status")
  bit = 1 << signal.SIGTERM - 1
  while process.poll() is None:
    lines = dict(x.split(":\t", 1) for x in status.read_text().splitlines())
    if int(lines["SigCgt"], 16) & bit:
      return
    time.sleep(0.002)


def no_evaluations(config: str, but: Sequence[str] = ()) -> list[str]:
  """Flags that leave out what a config evaluates, but for some by name."""
  left_out = set(config_lib.load(config).evals) - set(but)
  return [f"--config.evals.{name}.split=nowhere" for name in sorted(left_out)]


def no_compositional(config: str, but: Sequence[str] = ()) -> list[str]:
  """Flags that leave out the compositional split, but for some by name."""
  names = config_lib.load(config).evals
  kept = [name for name in names if not name.endswith("_comp")]
  return no_evaluations(config, (*kept, *but))


def environ(**more: str) -> dict[str, str]:
  """The environment in which commands compile fast, and on a CPU."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": _xla_flags(),
    "JAX_COMPILATION_CACHE_DIR": _CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    **more,
  }


def start(
  module: str, *args: str, cwd: pathlib.Path, **more: str
) -> subprocess.Popen:
  """Starts `python -m vlp_jax.<module> <args>` in another directory."""
  return subprocess.Popen(
    [sys.executable, "-m", f"vlp_jax.{module}", *map(str, args)],
    cwd=cwd,
    env=environ(**more),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(module: str, *args: str, cwd: pathlib.Path, **more: str):
  """Runs a command to its end: (status, stdout, stderr)."""
  process = start(module, *args, cwd=cwd, **more)
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def run_here(module: str, *args: str, cwd: pathlib.Path):
  """As `run`, in this process: for commands that end before they compute."""
  out, err, argv = io.StringIO(), io.StringIO(), [module, *map(str, args)]
  status = 0
  with (
    contextlib.chdir(cwd),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    mock.patch.object(sys, "argv", argv),
    mock.patch.object(command, "keep_compiled"),
  ):
    try:
      command.execute(importlib.import_module(f"vlp_jax.{module}").main)
    except SystemExit as stop:
      status = stop.code
  return status, out.getvalue(), err.getvalue()


def train(
  method: str, workdir: str, *args: str, cwd: pathlib.Path
) -> tuple[pathlib.Path, str]:
  """Runs a method's `debug` size to its end: (its folder, stdout)."""
  status, out, err = run(
    "main",
    f"--config=configs/{method}.py:debug",
    f"--workdir={cwd / workdir}",
    *SMALL,
    *args,
    cwd=cwd,
  )
  assert status == 0, err
  return cwd / workdir, out


def results(workdir: pathlib.Path) -> dict:
  """Reads what a run has left."""
  return json.loads((workdir / "results.json").read_text())


def lines(workdir: pathlib.Path) -> list[dict]:
  """Reads metrics.jsonl without what a clock has measured."""
  kept = []
  for text in (workdir / "metrics.jsonl").read_text().splitlines():
    line = json.loads(text)
    kept.append({k: v for k, v in line.items() if not k.startswith("time/")})
  return kept


def data_file(checkpoint: pathlib.Path) -> pathlib.Path:
  """Returns the file of a checkpoint that holds its arrays."""
  files = checkpoint.glob("state/**/d/*")
  return max(files, key=lambda path: path.stat().st_size)


def flip_bit(checkpoint: pathlib.Path) -> None:
  """Flips a bit in the middle of a checkpoint's arrays."""
  path = data_file(checkpoint)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def said(err: str) -> list[str]:
  """Returns the lines of stderr, without what XLA says of cached programs."""
  lines = (line for line in err.splitlines() if line.strip())
  return [line for line in lines if "cpu_aot_loader" not in line]


def assert_one_line(status: int, err: str, hint: str) -> None:
  """Asserts that a command ended as after a mistake of the user's."""
  assert status == 2, err
  errors = said(err)
  assert len(errors) == 1, err
  assert errors[0].startswith("error: ")
  assert hint in errors[0]
