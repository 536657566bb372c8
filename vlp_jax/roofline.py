"""What a train step costs on chips, from the program that XLA makes of it."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from vlp_jax import chips, flops, hlo, optim, sharding, train_state, train_step
from vlp_jax import config as config_lib
from vlp_jax.data import joint
from vlp_jax.errors import UserError
from vlp_jax.methods import base as methods
from vlp_jax.ops import attention, platforms

Shape = tuple[int, int, int]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
  """What a compiled step costs: of one chip, unless it says otherwise.

  Attributes:
    method: its name.
    chips: how many there are.
    mesh: devices along data, fsdp and tensor.
    remat: what is computed again, see `config.model.remat`.
    batch_size: global examples of a step.
    accumulate: chunks.
    parameters: of the model.
    fits: whether XLA finds room for it.
    memory: bytes that a step needs.
    state: bytes of these that hold the state (parameters, averages, moments).
    model_operations: of the losses and their gradient, nothing computed again.
    operations: of the program's matrix products.
    moved: bytes read from HBM and written there.
    sent: bytes sent to other chips, by kind of collective.
    collectives: how often they run, by kind.
    kernels: how often a kernel runs that says nothing of its operations.
    seconds: what takes how long at least, see `summary`.
    links: to other chips, of the chip that has fewest.
    attention: what computes it and why, an entry for each answer.
    compile_seconds: of tracing and compiling, on this machine.
    stream: whose batches the step is on; "mean" is that of all.
    share: of the run's steps.
  """

  method: str
  chips: int
  mesh: Shape
  remat: str
  batch_size: int
  accumulate: int
  parameters: int
  fits: bool
  memory: int
  state: int
  model_operations: float
  operations: float = 0.0
  moved: float = 0.0
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  collectives: dict[str, int] = dataclasses.field(default_factory=dict)
  kernels: int = 0
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  links: int = 0
  attention: tuple[attention.Choice, ...] = ()
  compile_seconds: float = 0.0
  stream: str = "train"
  share: float = 1.0

  @property
  def utilisation(self) -> float:
    """The most that the model's operations can be of the chip's peak."""
    return self.seconds["model"] / self.seconds["step"]


@platforms.compiling_for("tpu")
def examine(config, devices: list[Any], shape: Shape, stream=None) -> Report:
  """Compiles the train step for chips, and counts what it does.

  Args:
    config: of the run; `model.dtype=auto` is bfloat16.
    devices: of a `jax.experimental.topologies` description.
    shape: of the mesh.
    stream: whose batches the step is on, see `joint.configs`; else `config`.

  Raises:
    UserError: if the config cannot run on the mesh, or XLA not compile it.
  """
  started = time.monotonic()
  config, stream = on_mesh(config, shape), on_mesh(stream or config, shape)
  method = methods.of_stream(config, stream)
  mesh = sharding.make_mesh(shape, devices)
  step, state, batch = abstract_step(config, mesh, stream)
  with attention.choices() as chosen:
    lowered = step.trace(state, batch).lower(lowering_platforms=("tpu",))
  report = Report(
    method=config.method.name,
    chips=len(devices),
    mesh=shape,
    remat=config.model.remat,
    batch_size=stream.batch_size,
    accumulate=config.accumulate,
    parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    fits=False,
    memory=0,
    state=shard_bytes(state),
    model_operations=flops.model_flops(method, batch) / len(devices),
    attention=tuple(chosen),
  )
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    change = {"memory": needed(str(error), shard_bytes((state, batch)))}
  else:
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    used += memory.generated_code_size_in_bytes
    change = {"memory": used}
    chip = chips.get(devices[0].device_kind)
    if used <= chip.memory:  # XLA looks at what it needs beside the arguments
      work = list(hlo.Module(compiled.as_text()).work())
      links = chips.links(chip, slice_shape(devices))
      figures = summary(work, report.model_operations, chip, links)
      change |= {"fits": True, "links": links, **figures}
  seconds = round(time.monotonic() - started, 1)
  return dataclasses.replace(report, **change, compile_seconds=seconds)


def slice_shape(devices: list[Any]) -> Shape:
  """How many chips lie along each axis of a slice."""
  return tuple(len({d.coords[i] for d in devices}) for i in range(3))


def on_mesh(config, shape: Shape):
  """A copy of a config for a mesh of accelerators."""
  config = config.copy_and_resolve_references()
  if config.model.dtype == "auto":
    config.model.dtype = "bfloat16"
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
  return config


def abstract_step(
  config, mesh, stream=None
) -> tuple[Any, train_state.TrainState, Any]:
  """The jitted step of a run, and what it takes, with shardings.

  Args:
    config: of the run.
    mesh: of its devices.
    stream: as of `examine`.

  Returns:
    The step, the state and a batch, both abstract.

  Raises:
    UserError: if the config cannot run on the mesh.
  """
  stream = stream or config
  method = methods.of_stream(config, stream)
  config_lib.validate(stream, mesh.size, method.match_group)
  optimizer, _ = optim.make_optimizer(config, 100_000, 1000)
  state = abstract_state(config, mesh)
  rows = NamedSharding(mesh, sharding.BATCH)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
    for name, x in train_state.batch_spec(stream).items()
  }
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.jit_step(config, method, optimizer, mesh, shardings)
  return step, state, batch


def abstract_state(config, mesh) -> train_state.TrainState:
  """Shapes, dtypes and shardings of a run's state."""
  method = methods.get(config.method.name, config)
  optimizer, _ = optim.make_optimizer(config, 100_000, 1000)
  state = jax.eval_shape(
    lambda: train_state.of_config(config, method, optimizer)
  )
  return sharding.with_shardings(state, mesh)


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's part of a tree with shardings."""

  def size(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return 8
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))


def needed(message: str, arguments: int) -> int:
  """Reads from XLA's error how many bytes it would have needed.

  Args:
    message: the error.
    arguments: bytes of what a step takes.

  Raises:
    UserError: if the error is another one.
  """
  size = r"([\d.]+)([KMGT])"
  whole = re.search(rf"Used {size} of ", message)
  beside = re.search(rf"for HLO temporaries \({size}\) exceeds", message)
  found = whole or beside
  if not found:
    line = message.splitlines()[0][:300]
    raise UserError(f"XLA cannot compile this step: {line}")
  needs = round(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
  return needs if whole else needs + arguments


def summary(
  work: list[hlo.Work], model_operations: float, chip: chips.Chip, links: int
) -> dict[str, Any]:
  """Sums up what a program does, and bounds its time.

  Seconds, each at the chip's published peak: `model`, the model's operations;
  `operations`, the program's, those of float32 as several of bfloat16; `hbm`,
  bytes moved; `instructions`, one after the other, each the longer of its
  operations and its bytes; `collectives`, over so many links at once, whatever
  lies between (of devices of one chip, which need none, 0); and `step`, the
  longest of these: all else is taken to hide behind it.
  """
  sent, number = Counter(), Counter()
  for one in work:
    if one.collective:
      sent[one.collective.kind] += one.times * one.collective.sent
      number[one.collective.kind] += one.times
  operations = sum(one.times * one.operations for one in work)
  bfloat16 = sum(one.times * one.bfloat16 for one in work)
  moved = sum(one.times * one.hbm_bytes for one in work)
  serial = sum(
    one.times * max(one.bfloat16 / chip.flops, one.hbm_bytes / chip.bandwidth)
    for one in work
    if one.waits and not one.collective
  )
  seconds = {
    "model": model_operations / chip.flops,
    "operations": bfloat16 / chip.flops,
    "hbm": moved / chip.bandwidth,
    "instructions": serial,
    "collectives": sum(sent.values()) / (chip.link * links) if links else 0.0,
  }
  seconds["step"] = max(seconds.values())
  return {
    "operations": operations,
    "moved": moved,
    "sent": dict(sent),
    "collectives": dict(number),
    "kernels": sum(one.times for one in work if one.opcode == "kernel"),
    "seconds": seconds,
  }


def mean(reports: Sequence[Report]) -> Report:
  """The mean step of a run whose steps are of several kinds.

  Args:
    reports: of all kinds, on one mesh.

  Returns:
    Means, but of memory the most.
  """
  one = reports[0]
  if len(reports) == 1:
    return one
  one = dataclasses.replace(
    one,
    stream="mean",
    share=sum(report.share for report in reports),
    memory=max(report.memory for report in reports),
  )
  if not all(report.fits for report in reports):
    return dataclasses.replace(one, fits=False, seconds={})

  def add(get: Callable[[Report], dict]) -> dict:
    total = Counter()
    for report in reports:
      for name, value in get(report).items():
        total[name] += report.share * value
    return dict(total)

  numbers = ("batch_size", "model_operations", "operations", "moved", "kernels")
  return dataclasses.replace(
    one,
    sent=add(lambda r: r.sent),
    collectives=add(lambda r: r.collectives),
    seconds=add(lambda r: r.seconds),
    compile_seconds=sum(report.compile_seconds for report in reports),
    **add(lambda r: {name: getattr(r, name) for name in numbers}),
  )


def splits(count: int) -> list[Shape]:
  """Meshes to compare: parameters on 1, 4, 16, ..., all, or with `tensor`."""
  sizes = [4**i for i in range(12) if count % 4**i == 0]
  found = [(count // n, n, 1) for n in dict.fromkeys((*sizes, count))]
  if count % 16 == 0:
    found.append((count // 16, 4, 4))
  return found


@platforms.compiling_for("tpu")
def suggest(config, report: Report, devices, memory: float) -> str:
  """Says what to try where a step does not fit.

  The state's part on a chip is known for every mesh. What is needed beside is
  taken to stay as it is.

  Args:
    config: of the run.
    report: of the mesh that does not hold it.
    devices: of the slice.
    memory: bytes of a chip.
  """
  beside = report.memory - report.state
  for shape in splits(len(devices)):
    mesh = sharding.make_mesh(shape, devices)
    state = shard_bytes(abstract_state(on_mesh(config, shape), mesh))
    fits = state < report.state and beside + state <= memory
    if fits and can_be(config, shape, config.accumulate):
      numbers = ",".join(map(str, shape))
      return (
        f"try --mesh={numbers}: about {(beside + state) / GIB:.1f} GiB a chip, "
        f"of which the state takes {state / GIB:.1f}"
      )
  ways = []
  if config.model.remat != "full":
    ways.append("--config.model.remat=full")
  if can_be(config, report.mesh, 2 * config.accumulate):
    ways.append(f"--config.accumulate={2 * config.accumulate}")
  return (
    f"beside its state it needs {beside / GIB:.1f} GiB, and no mesh of "
    f"{len(devices)} chips holds both: try {', '.join((*ways, 'more chips'))}"
  )


def can_be(config, shape: Shape, accumulate: int) -> bool:
  """Whether a run's batches can be cut for a mesh, and into so many chunks."""
  config = on_mesh(config, shape)
  config.accumulate = accumulate
  try:
    for _, _, stream in joint.configs(config):
      method = methods.of_stream(config, stream)
      config_lib.validate(stream, math.prod(shape), method.match_group)
  except UserError:
    return False
  return True
