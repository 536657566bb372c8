"""How much memory does a train step need? Chunks, remat, open_clip's CoCa.

  python -m benchmarks.memory                          about ten minutes
  python -m benchmarks.memory --methods=clip --peak=0  does it run at all

Two tables. Of every method's `tiny` model at 256 examples a step, what XLA sets
aside for a step beside its arguments, in 1, 4 and 16 chunks, as it compiles
them for a CPU (float32; examples are matched in groups of 16, in any chunks).

And of CoCa at the size `s16` of `benchmarks/train_step.py`, 16 examples a step,
the most memory that a process holds while it trains, beside open_clip's with
the same operations. Each has a process of its own. open_clip needs the [parity]
extra (docs/parity.md); without it its row is left out. One line of JSON is
added to `--output`.
"""

from __future__ import annotations

import argparse
import os
import pathlib

from benchmarks import open_clip_peer, rounds, train_step
from vlp_jax import step_memory

METHODS = ("clip", "coca", "sycoca", "albef", "simla", "scl")
CHUNKS = (1, 4, 16)
COMMON = ("batch_size=256", "optimizer.name=adamw")
GROUPS = ("method.match_group=16",)  # of those that match
# Name: overrides of the same model. Policies of remat are of layers in a loop.
PEAKS = {
  "ours": (),
  "ours, scan": ("model.scan=true",),
  "ours, remat dots": ("model.scan=true", "model.remat=dots"),
  "ours, remat full": ("model.scan=true", "model.remat=full"),
  "ours, 4 chunks": ("accumulate=4",),
  "ours, Adafactor": ("optimizer.name=adafactor",),
}
PEER = "open_clip"
MIB = 2**20


def main() -> None:
  options = parse()
  if options.worker:
    facts, run = make(options)
    rounds.serve(facts | {"peak": peak(run)}, run)
    return
  record = rounds.record(
    "memory",
    train_step.PACKAGES,
    dict(chunks=chunks(options.methods.split(",")), peaks=peaks(options)),
  )
  show(record)
  rounds.keep(record, options.output)


def parse() -> argparse.Namespace:
  parser = rounds.parser("memory", __doc__)
  parser.add_argument("--methods", default=",".join(METHODS))
  parser.add_argument("--peak", type=int, default=1, help="0: no second table")
  parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
  return parser.parse_args()


# --- What XLA sets aside ----------------------------------------------------


def chunks(names: list[str]) -> dict[str, dict[int, int]]:
  """Bytes of a compiled step, by method and number of chunks."""
  return {
    name: {count: temporary(name, count) for count in CHUNKS} for name in names
  }


def temporary(name: str, accumulate: int) -> int:
  """Bytes that a compiled step needs beside its arguments."""
  import jax

  from vlp_jax import config as config_lib
  from vlp_jax import roofline, sharding

  path = f"configs/{name}.py"
  groups = GROUPS if "match_group" in config_lib.load(path).method else ()
  config = config_lib.load(path, (*COMMON, *groups, f"accumulate={accumulate}"))
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  step, state, batch = roofline.abstract_step(config, mesh)
  compiled = step.lower(state, batch).compile()
  size = compiled.memory_analysis().temp_size_in_bytes
  print(f"{name}, {accumulate} chunks: {size / MIB:,.0f} MiB", flush=True)
  return size


# --- What a process holds ---------------------------------------------------


def peaks(options: argparse.Namespace) -> dict[str, int]:
  """Bytes that each process holds at most while it trains."""
  if not options.peak:
    return {}
  found = {}
  for name in (*((PEER,) if open_clip_peer.available() else ()), *PEAKS):
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if name != PEER:
      environ = step_memory.environment(environ) or environ
    worker = rounds.Worker(__spec__.name, name, environ)
    found[name] = worker.facts["peak"]
    worker.close()
    print(f"{name}: {found[name] / MIB:,.0f} MiB", flush=True)
  return found


def make(options: argparse.Namespace):
  """Makes one of the second table's: facts, and what runs so many steps."""
  size = argparse.Namespace(size="s16", batch_size=16, dtype="float32")
  if options.worker == PEER:
    return train_step.make_peer(train_step.load_config("coca_base", size))
  more = PEAKS[options.worker]
  config = train_step.load_config("coca_base", size, *more)
  return train_step.make_ours(config, 1)


def peak(run) -> int:
  """Bytes that this process holds at most in two steps; Linux tells."""
  run(1)
  # What it held while it compiled is forgotten.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  run(2)
  status = pathlib.Path("/proc/self/status").read_text()
  (line,) = [x for x in status.splitlines() if x.startswith("VmHWM:")]
  return 1024 * int(line.split()[1])


# --- The report -------------------------------------------------------------


def show(record: dict) -> None:
  rounds.show_machine(record["machine"])
  print("\nMiB beside the arguments, in 1, 4 and 16 chunks; ratios to one")
  for name, sizes in record["chunks"].items():
    whole = sizes[1]
    print(
      f"{name:8}"
      + "".join(f"{size / MIB:10,.0f}" for size in sizes.values())
      + "".join(f"{size / whole:8.2f}" for size in sizes.values())
    )
  print("\nthe most that a process holds; ratio to open_clip's")
  for name, size in record["peaks"].items():
    peer = record["peaks"].get(PEER)
    ratio = f"{size / peer:8.2f}" if peer else ""
    print(f"{name:20}{size / MIB:10,.0f} MiB{ratio}")


if __name__ == "__main__":
  main()
