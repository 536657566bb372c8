"""What steps at the papers' batches cost on TPU slices that nobody holds.

  python -m benchmarks.slices --output=runs/slices

Compiles every row with `python -m vlp_jax.aot` (docs/sharding.md), minutes
each, and prints a table, with the command of each row. Killed and started
again, it goes on: rows that are there are kept, unless their command or the
versions are others; after a change of the code, give another folder. A row on
which libtpu itself crashes is told and left out. Needs the [tpu] extra.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

from benchmarks import rounds
from vlp_jax import chips
from vlp_jax.roofline import GIB

_WHOLE = "--config.method.caption_chunk=0"
_ONE = "--config.accumulate=1"
# The kernel and this policy are the best that there is by these counts: what
# products make is kept, probabilities and all that is cheap are made again.
_BEST = ("--config.model.attention=tpu", "--config.model.remat=dots")
# Where 256 examples a chip leave no room for that.
_FULL = ("--config.model.attention=tpu", "--config.model.remat=full")
# Config, mesh, and what else is changed. Parameters are split over few chips
# where a step has many passes, each of which gathers them.
_PLANS = (
  ("sycoca.py:b16", "16,16,1", (_WHOLE, *_BEST)),
  ("sycoca.py:l14", "16,16,1", (_WHOLE, *_BEST)),
  ("coca.py:b16", "16,16,1", (_WHOLE, *_BEST)),
  ("coca.py:l14", "16,16,1", _FULL),
  ("simla.py:b16", "64,4,1", _BEST),
  ("simla.py:l14", "64,4,1", _BEST),
  ("scl.py:b16", "64,4,1", (_ONE, *_BEST)),
  ("scl.py:l14", "64,4,1", (_ONE, *_BEST)),
)
ROWS = (
  *(("v5e:16x16", *plan) for plan in _PLANS),
  ("v5p:4x8x8", "coca.py:g18", "16,16,1", _FULL),
  *(("v6e:16x16", *plan) for plan in _PLANS),
  # 512 examples are two a chip of those: the same where they are 16.
  ("v5e:4x8", "simla.py:l14", "8,4,1", _BEST),
)
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
HEADS = (
  *("slice", "config", "mesh (data, fsdp, tensor)", "batch, chunks", "remat"),
  *("GiB", "done / model's", "operations", "HBM", "one by one"),
  *("collectives, of operations", "utilisation at most"),
)


def command(row) -> list[str]:
  """The command line of a row, without the interpreter and the output."""
  topology, config, mesh, changes = row
  return [
    *("-m", "vlp_jax.aot", f"--config=configs/{config}"),
    *(f"--topology={topology}", f"--mesh={mesh}", *changes),
  ]


def cells(row, report: dict) -> list[str]:
  """A line of the table."""
  topology, config, mesh, _ = row
  memory = chips.CHIPS[KINDS[topology.split(":")[0]]].memory
  chunks = report["accumulate"]
  first = [
    *(topology, config, mesh.replace(",", ", ")),
    f"{report['batch_size']:,}" + (f" in {chunks}" if chunks > 1 else ""),
    report["remat"],
    f"{report['memory'] / GIB:.1f} of {memory / GIB:.0f}",
  ]
  if not report["fits"]:
    return [*first, "does not fit", *[""] * (len(HEADS) - len(first) - 1)]
  seconds = report["seconds"]
  times = ("operations", "hbm", "instructions", "collectives")
  *others, collectives = (_milliseconds(seconds[name]) for name in times)
  return [
    *first,
    f"{report['operations'] / report['model_operations']:.2f}",
    *others,
    f"{collectives}, {seconds['collectives'] / seconds['operations']:.0%}",
    f"{seconds['model'] / seconds['step']:.0%}",
  ]


def _milliseconds(seconds: float) -> str:
  digits = 1 if seconds < 0.1 else 0
  return f"{1000 * seconds:,.{digits}f} ms"


def compile_row(row) -> dict:
  """What `vlp_jax.aot` says of a row, in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "report.json")
    run = [sys.executable, *command(row), f"--output={path}"]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def main() -> None:
  """Compiles what is missing, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, default="runs/slices")
  parser.add_argument("--only", default="", help="of rows, a part of the name")
  args = parser.parse_args()
  lines, commands, missing = [], [], []
  for row in ROWS:
    name = f"{row[0]}_{row[1]}".replace(":", "_").replace(".py", "")
    if args.only in name:
      print(f"{row[1]} for {row[0]}", flush=True)
      try:
        found = rounds.once(
          args.output / f"{name}.json",
          rounds.with_versions(shlex.join(command(row))),
          functools.partial(compile_row, row),
        )
      except subprocess.CalledProcessError as error:
        print(f"  left out: its compiler ended with {error.returncode}")
        missing.append(name)
        continue
      lines.append(cells(row, *found["reports"]))
      commands.append(shlex.join(["python", *command(row)]))
  rounds.show_table(HEADS, lines)
  print("", *commands, sep="\n")
  if missing:
    sys.exit(f"not compiled: {', '.join(missing)}; start again to try again")


if __name__ == "__main__":
  main()
