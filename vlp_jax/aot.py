"""Compiles a train step for TPUs that nobody holds, and says what it costs.

  python -m vlp_jax.aot --config=configs/sycoca.py:l14 --topology=v5e:16x16

  --config=FILE[:SIZE]     a file of configs/, and one of its sizes
  --topology=KIND:SHAPE    v5e:16x16, v6e:16x16, v5p:8x8x8, ...
  --mesh=DATA,FSDP,TENSOR  instead of config.mesh
  --sweep                  other meshes and policies of config.model.remat, too
  --output=FILE.json       also writes what it prints
  --config.FIELD=VALUE     overrides a field

Prints whether a step fits, its operations beside the model's own, what it
moves, what chips send each other, and the least time that it can take
(docs/sharding.md). Runs on any machine with a CPU, minutes a step; needs XLA's
compiler for TPUs: pip install 'vlp_jax[tpu]'.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table
from jax.experimental import topologies

from vlp_jax import chips, command, libtpu, roofline, sharding
from vlp_jax import config as config_lib
from vlp_jax.data import joint
from vlp_jax.errors import UserError
from vlp_jax.models.transformer import REMAT_POLICIES
from vlp_jax.roofline import GIB, Report, Shape

FLAGS = dict(topology="", mesh="", sweep=False, output="")


def main(argv: Sequence[str]) -> None:
  """Reads the command line, compiles and prints."""
  config, flags = config_lib.parse_command_line(argv, FLAGS, usage=__doc__)
  devices = get_devices(flags["topology"])
  chip = chips.get(devices[0].device_kind)
  if chip is None:
    raise UserError(f"nothing is known of {devices[0].device_kind}: chips.py")
  shape = mesh_of(config, flags["mesh"], len(devices))
  plans = [(shape, config.model.remat)]
  if flags["sweep"]:
    shapes = dict.fromkeys((shape, *roofline.splits(len(devices))))
    plans = list(itertools.product(shapes, ("none", *REMAT_POLICIES)))
  reports, means = [], []
  for shape, remat in plans:
    config.model.remat = remat
    try:
      found = examine(config, devices, chip, shape)
    except UserError as error:
      if not flags["sweep"]:
        raise
      print(f"  left out: {error}")  # a mesh that the batch cannot be cut for
      continue
    means.append(roofline.mean(found))
    reports += found if len(found) == 1 else [*found, means[-1]]
    if flags["output"]:
      write(flags["output"], flags["config"], flags["topology"], reports)
  if flags["sweep"]:
    show_sweep(means)


def examine(
  config, devices: Sequence[Any], chip: chips.Chip, shape: Shape
) -> list[Report]:
  """Compiles and shows a run's steps: on pictures and, if it has any, on clips.

  Args:
    config: of the run.
    devices: of the slice.
    chip: what is known of each.
    shape: of the mesh.

  Raises:
    UserError: as `roofline.examine` and `joint.configs`.
  """
  found = []
  for name, share, stream in joint.configs(config):
    print(
      f"compiling {name} for {name_of(shape)}, remat {config.model.remat}",
      flush=True,
    )
    report = roofline.examine(config, devices, shape, stream)
    found.append(dataclasses.replace(report, stream=name, share=share))
    show(report, chip)
    if not report.fits:
      print(roofline.suggest(config, report, devices, chip.memory))
  if len(found) > 1:
    show(roofline.mean(found), chip, "mean of these, by their shares, ")
  return found


def get_devices(topology: str) -> list[Any]:
  """Returns stand-ins for the chips of a slice.

  Raises:
    UserError: without libtpu, or where there is no such slice.
  """
  if not topology:
    raise UserError("--topology=KIND:SHAPE is missing, for instance v5e:16x16")
  if not importlib.util.find_spec("libtpu"):
    raise UserError(
      "XLA's compiler for TPUs is not installed: pip install 'vlp_jax[tpu]'"
    )
  # Before libtpu is read: no chip is here to be asked for, or to be shared.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.replace(":", "-"))
  libtpu.enlarge_stacks()
  jax.config.update("jax_platforms", "cpu")
  try:
    return list(topologies.get_topology_desc(topology, platform="tpu").devices)
  except Exception as error:  # of various types
    reason = str(error).splitlines()[0][:150]
    raise UserError(
      f"--topology={topology} is no slice that can be compiled for ({reason}); "
      "such are v5e:16x16, v6e:16x16 and v5p:8x8x8"
    ) from None


def mesh_of(config, text: str, count: int) -> Shape:
  """Reads `--mesh`, or else takes `config.mesh`.

  Raises:
    UserError: if these are no three numbers, or not for all chips.
  """
  if not text:
    return config_lib.mesh_shape(config, count)
  if not re.fullmatch(r"\d+,\d+,\d+", text):
    raise UserError(f"--mesh={text} is not DATA,FSDP,TENSOR, such as 64,4,1")
  shape = tuple(map(int, text.split(",")))
  if math.prod(shape) != count:
    raise UserError(f"--mesh={text} is not made of the slice's {count} chips")
  return shape


def name_of(shape: Shape) -> str:
  """A mesh in words."""
  return " x ".join(
    f"{n} {axis}" for n, axis in zip(shape, sharding.AXES, strict=True)
  )


def show(report: Report, chip: chips.Chip, what: str = "") -> None:
  """Prints what there is to know of one mesh."""
  print(
    f"{report.method}: {what}{report.parameters:,} parameters, "
    f"{report.batch_size:,.0f} examples a step in {report.accumulate} chunks, "
    f"on {report.chips} chips"
  )
  for kernel, reason in report.attention:
    print(f"attention: {kernel} ({reason})")
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  table.add_column("of one chip")
  table.add_column("", justify="right")
  table.add_column("at least", justify="right")
  table.add_column("")

  def row(name, value, seconds=None, note=""):
    time = "" if seconds is None else f"{1000 * seconds:.1f} ms"
    table.add_row(name, value, time, note)

  row(
    "memory",
    f"{report.memory / GIB:.1f} GiB",
    note=("fits" if report.fits else "does NOT fit")
    + f" {chip.memory / GIB:.1f}; the state is {report.state / GIB:.1f}",
  )
  seconds = report.seconds
  if seconds:
    again = report.operations / report.model_operations
    row(
      "operations", f"{report.operations / 1e12:.2f} T", seconds["operations"]
    )
    row(
      "  of the model",
      f"{report.model_operations / 1e12:.2f} T",
      seconds["model"],
      f"{again:.2f} times are done",
    )
    row("HBM", f"{report.moved / 1e9:.1f} GB", seconds["hbm"])
    if report.kernels:
      row("kernels", f"{report.kernels:.0f} times", note="are not counted here")
    row("one by one", "", seconds["instructions"], "the longer of both, each")
    for kind, size in report.sent.items():
      number = f"{report.collectives[kind]:.0f} times"
      link = chip.link * report.links
      row(kind, f"{size / 1e9:.3f} GB", link and size / link, number)
    row(
      "a step",
      "",
      seconds["step"],
      f"utilisation at most {report.utilisation:.0%}",
    )
  rich.console.Console().print(table)


def show_sweep(reports: Sequence[Report]) -> None:
  """Prints a line for each mesh and policy, the fastest first."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  heads = ("mesh", "remat", "GiB", "ratio", "collectives", "a step", "at most")
  for head in heads:
    table.add_column(head, justify="left" if head in heads[:2] else "right")
  for report in sorted(reports, key=lambda r: r.seconds.get("step", math.inf)):
    cells = ["does not fit", "", "", ""]
    if report.fits:
      cells = [
        f"{report.operations / report.model_operations:.2f}",
        f"{1000 * report.seconds['collectives']:.1f} ms",
        f"{1000 * report.seconds['step']:.1f} ms",
        f"{report.utilisation:.0%}",
      ]
    memory = f"{report.memory / GIB:.1f}"
    table.add_row(name_of(report.mesh), report.remat, memory, *cells)
  rich.console.Console().print(table)


def write(
  path: str, config: str, topology: str, reports: Sequence[Report]
) -> None:
  """Writes reports as JSON."""
  command.make_folder(pathlib.Path(path).parent)
  found = {
    "config": config,
    "topology": topology,
    "reports": [dataclasses.asdict(report) for report in reports],
  }
  pathlib.Path(path).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  command.execute(main)
