"""What chips send each other, beside the least that they must, as they grow.

  python -m benchmarks.scaling --output=runs/scaling

Compiles the train step of `configs/clip.py:b16` for slices of up to 4,096 TPU
chips that nobody holds (docs/sharding.md), with the same number of examples a
chip, and prints what a chip sends in a step by `vlp_jax.hlo`, and the least
that this way to split a step needs (`least`). Killed and started again, it goes
on: slices that are there are kept, unless the versions are others; after a
change of the code, give another folder. Needs the [tpu] extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib

from benchmarks import rounds
from vlp_jax import aot, roofline
from vlp_jax import config as config_lib

CONFIG = "configs/clip.py:b16"
EXAMPLES = 8  # a chip
FSDP = 16  # chips that parameters are split over, where there are as many
# A slice, and how many of its chips are used.
SLICES = (
  *(("v5e:2x2", 1), ("v5e:2x2", 4), ("v5e:4x4", 16), ("v5e:8x8", 64)),
  *(("v5e:16x16", 256), ("v5p:8x16x8", 1024), ("v5p:16x16x16", 4096)),
)
_BF16, _FLOAT32 = 2, 4
HEADS = (
  *("chips", "slice", "mesh", "batch", "sent a chip", "at least", "ratio"),
  "sent of all-gather, reduce-scatter, all-reduce, others",
)


def least(
  weights: int, table: int, mesh: roofline.Shape, batch_size: int, dim: int
) -> float:
  """Bytes that a chip must send in a step of CLIP that is split in this way.

  Weights, in bfloat16, are gathered twice, for the forward and the backward
  pass; of the vocabulary's table, chips look up the few rows that captions
  have. The gradients of both, of the same size, are scattered over the chips
  that share a copy, and there summed up over copies, which sends a part twice.
  Embeddings of both sides, in float32, are gathered for the contrast, and
  their gradients scattered.

  Args:
    weights: numbers in them.
    table: numbers in the vocabulary's table.
    mesh: chips along data, fsdp and tensor; the last is 1.
    batch_size: global examples.
    dim: of an embedding.
  """
  data, fsdp, _ = mesh
  gathered = 2 * _BF16 * weights
  gradients = _BF16 * (weights + table)
  embeddings = 2 * _FLOAT32 * batch_size * dim
  chips = data * fsdp
  return (
    (gathered + gradients) * (fsdp - 1) / fsdp
    + 2 * gradients / fsdp * (data - 1) / data
    + 2 * embeddings * (chips - 1) / chips
  )


def compile_for(topology: str, count: int) -> dict:
  """Compiles a step for some chips of a slice; returns its report."""
  config = config_lib.load(CONFIG, [f"batch_size={EXAMPLES * count}"])
  fsdp = min(FSDP, count)
  devices = aot.get_devices(topology)[:count]
  report = roofline.examine(config, devices, (count // fsdp, fsdp, 1))
  table = config.tokenizer.vocab_size * config.model.text.width
  return dataclasses.asdict(report) | {
    "table": table,
    "embed_dim": config.model.embed_dim,
  }


def cells(topology: str, report: dict) -> list[str]:
  """A line of the table."""
  mesh = report["mesh"]
  sent = dict(report["sent"])
  total = sum(sent.values())
  must = least(
    report["parameters"] - report["table"],
    report["table"],
    mesh,
    report["batch_size"],
    report["embed_dim"],
  )
  kinds = ("all-gather", "reduce-scatter", "all-reduce")
  parts = [sent.pop(kind, 0.0) for kind in kinds]
  return [
    f"{report['chips']:,}",
    topology,
    " x ".join(map(str, mesh)),
    f"{report['batch_size']:,}",
    f"{total / 1e6:,.0f} MB",
    f"{must / 1e6:,.0f} MB",
    f"{total / must:.2f}" if must else "",
    ", ".join(f"{x / 1e6:,.0f}" for x in (*parts, sum(sent.values()))) + " MB",
  ]


def main() -> None:
  """Compiles what is missing, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, default="runs/scaling")
  parser.add_argument("--most", type=int, default=4096, help="chips")
  args = parser.parse_args()
  lines = []
  for topology, count in SLICES:
    if count <= args.most:
      print(f"{count:,} chips of {topology}", flush=True)
      report = rounds.once(
        args.output / f"{count}.json",
        rounds.with_versions(f"{CONFIG}, {EXAMPLES} a chip, {topology}"),
        functools.partial(compile_for, topology, count),
      )
      lines.append(cells(topology, report))
  rounds.show_table(HEADS, lines)


if __name__ == "__main__":
  main()
