"""Counts what a compiled program does, from its text.

XLA's own `cost_analysis()` counts the body of a loop once, and its bytes take
in what never leaves a chip's fast memory. Here every computation is counted as
often as it runs: matrix products, bytes to and from HBM, and collectives.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vlp_jax import hlo_text
from vlp_jax.hlo_text import Array, Computation, Instruction

COLLECTIVES = (
  *("all-reduce", "all-gather", "reduce-scatter"),
  *("all-to-all", "collective-permute"),
)
# What moves nothing itself.
_FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("partition-id", "replica-id", "after-all", "iota", "opt-barrier"),
)
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
# Custom calls that give memory, or a name to what lies there.
_EMPTY = re.compile(r'custom_call_target="(?:AllocateBuffer|ConcatBitcast)"')
_SLICES = ("dynamic-slice", "slice", "gather")
# Of TPUs, whose products are of bfloat16: how many make up one of float32, by
# what is asked of each side. A side that is bfloat16 needs no such parts.
# https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.DotAlgorithmPreset
_PASSES = {"default": 1, "high": 3, "highest": 6}


class Collective(NamedTuple):
  """What chips tell each other.

  Attributes:
    kind: one of `COLLECTIVES`.
    bytes: that a chip gives.
    group: number of chips; 0 where it is not said.
    channel: its number; 0 where it has none. Where it runs beside others, the
      instructions that begin it, go on with it and end it share it.
    begins: whether it is begun here, to go on beside others.
  """

  kind: str
  bytes: int
  group: int
  channel: int = 0
  begins: bool = False

  @property
  def sent(self) -> float:
    """The least bytes that a chip must send, whatever the algorithm."""
    share = (self.group - 1) / self.group if self.group else 1.0
    if self.kind == "all-gather":
      return share * self.bytes * self.group
    return share * self.bytes * (2 if self.kind == "all-reduce" else 1)


class Work(NamedTuple):
  """An instruction that does something.

  Attributes:
    opcode: of HLO; or "kernel", a program of its own that says nothing of what
      it does.
    operations: multiplications and additions of its matrix products; those of a
      kernel as it says itself (`pl.CostEstimate`).
    bfloat16: as many of bfloat16 take as long on a TPU; more, where a product
      of float32 is asked for.
    hbm_bytes: that it reads from HBM and writes there.
    times: how often it runs.
    waits: False where it is started, and waited for elsewhere.
    collective: what it sends, or None.
  """

  opcode: str
  operations: int
  bfloat16: int
  hbm_bytes: int
  times: int
  waits: bool
  collective: Collective | None


class Module:
  """A compiled program.

  Args:
    text: of `compiled.as_text()`: optimised HLO, one device's.
  """

  def __init__(self, text: str):
    self.computations, self.entry = hlo_text.read(text)

  def work(self) -> Iterator[Work]:
    """Yields all that one run of the program does."""
    return self._work(self.entry, 1, set())

  def _work(self, name: str, times: int, begun: set[int]) -> Iterator[Work]:
    """As `work`, of a computation; `begun` are channels of what goes on."""
    computation = self.computations[name]
    for one in computation.values():
      if one.opcode in _FREE or one.opcode.endswith("-done"):
        continue
      if one.opcode == "custom-call" and _EMPTY.search(one.rest):
        continue
      called = _called(one)
      if one.opcode == "while":
        count = times * self._trips(one, computation)
        yield from self._work(_part(one, "body"), count, begun)
      elif one.opcode == "call":
        yield from self._work(called[0], times, begun)
      elif one.opcode == "conditional":
        branches = [list(self._work(branch, times, begun)) for branch in called]
        yield from max(branches, key=lambda b: sum(w.operations for w in b))
      else:
        collective = self._collective(one, computation)
        if collective and collective.channel:
          if collective.channel in begun and not collective.begins:
            collective = None  # begun before; this works beside it
          else:
            begun.add(collective.channel)
        silent = _KERNEL in one.rest and not _ESTIMATE.search(one.rest)
        products = self._products(one, computation)
        yield Work(
          "kernel" if silent else one.opcode,
          sum(operations for operations, _ in products),
          sum(operations * passes for operations, passes in products),
          self._hbm_bytes(one, computation),
          times,
          not one.opcode.endswith("-start"),
          collective,
        )

  def _trips(self, loop: Instruction, where: Computation) -> int:
    """How often a loop runs: by where its counter starts, its steps, its end.

    Loops over pieces that chips hand on take several at a time.
    """
    condition, body = _part(loop, "condition"), _part(loop, "body")
    end, body = self._end(condition), self.computations[body]
    counters = [
      int(re.search(r"index=(\d+)", one.rest)[1])
      for one in self.computations[condition].values()
      if one.opcode == "get-tuple-element" and one.arrays[0].dims == ()
    ]
    if not counters:
      return end
    first = where.get(_element(where[loop.operands[0]], counters[0]))
    start = int(first.inside) if first and first.opcode == "constant" else 0
    root = next(one for one in body.values() if one.is_root)
    step = _increase(_element(root, counters[0]), body)
    return math.ceil((end - start) / step)

  def _end(self, condition: str) -> int:
    """The number that a loop's counter is compared with."""
    found = [1]
    for one in self.computations[condition].values():
      if one.opcode == "constant" and one.inside.isdigit():
        found.append(int(one.inside))
      found += map(self._end, _called(one))
    return max(found)

  def _products(
    self, one: Instruction, where: Computation
  ) -> list[tuple[int, int]]:
    """Of matrix products, nested ones too: operations, and passes of each."""
    if one.opcode in ("dot", "convolution"):
      sides = [where[x].arrays[0] for x in one.operands]
      count = _dot if one.opcode == "dot" else _convolution
      return [(count(one, *(x.dims for x in sides)), _passes(one, sides))]
    if one.opcode == "custom-call":
      said = _ESTIMATE.search(one.rest)
      return [(int(said[1]), 1)] if said else []
    if one.opcode in ("fusion", "async-start"):
      return [x for name in _called(one) for x in self._inner_products(name)]
    return []

  @functools.cache  # noqa: B019  # a module lives as long as what counts it
  def _inner_products(self, name: str) -> list[tuple[int, int]]:
    inner = self.computations[name]
    return [x for one in inner.values() for x in self._products(one, inner)]

  def _hbm_bytes(self, one: Instruction, where: Computation) -> int:
    """Bytes read and written in HBM; of slices and updates, only those."""
    sources = [where[name] for name in one.operands if name in where]
    if one.opcode == "fusion":
      (inner,) = _called(one)
      read = sum(
        min(source.arrays[0].hbm_bytes, self._read(inner, i))
        for i, source in enumerate(sources)
        if len(source.arrays) == 1
      )
      return read + self._written(inner, one.arrays)
    if one.opcode in _SLICES:
      moved = sum(array.bytes for array in one.arrays)
      ends = (sources[0].arrays[0].in_hbm, one.arrays[0].in_hbm)
      return moved * sum(ends)
    if one.opcode == "dynamic-update-slice":
      return (sources[1].arrays[0].bytes) * (1 + one.arrays[0].in_hbm)
    if one.opcode in ("copy-start", "slice-start"):
      # Its type holds what is copied, the copy, and a flag.
      copy = one.arrays[1]
      return copy.bytes * (sources[0].arrays[0].in_hbm + copy.in_hbm)
    arrays = [a for source in sources for a in source.arrays]
    if not one.opcode.endswith("-start"):
      arrays += one.arrays
    return sum(array.hbm_bytes for array in arrays)

  @functools.cache  # noqa: B019
  def _read(self, name: str, index: int) -> int:
    """Bytes that a fusion reads of an operand: of slices, only those."""
    inner = self.computations[name]
    mine = next(
      one.name
      for one in inner.values()
      if one.opcode == "parameter" and one.inside == str(index)
    )
    total = 0
    todo = [mine]
    while todo:
      current = todo.pop()
      for one in inner.values():
        if current not in one.operands:
          continue
        at = one.operands.index(current)
        if one.opcode == "tuple" or one.opcode in COLLECTIVES:
          pass  # handed on; links bring what chips send each other
        elif one.opcode == "bitcast":
          todo.append(one.name)
        elif one.opcode in _SLICES and at == 0:
          total += one.arrays[0].bytes
        elif one.opcode == "dynamic-update-slice" and at == 0:
          pass  # updated in place
        elif one.opcode == "fusion":
          (nested,) = _called(one)
          total += self._read(nested, at)
        else:
          total += inner[mine].arrays[0].bytes
    return total

  def _written(self, name: str, arrays: tuple[Array, ...]) -> int:
    """Bytes that a fusion writes; of what it updates in place, the update."""
    inner = self.computations[name]
    root = next(one for one in inner.values() if one.is_root)
    parts = [root]
    if root.opcode == "tuple":
      parts = [inner[operand] for operand in root.operands]
    total = 0
    for part, array in zip(parts, arrays, strict=False):
      while part.opcode == "bitcast" and part.operands[0] in inner:
        part = inner[part.operands[0]]
      if part.opcode == "parameter" or part.opcode in COLLECTIVES:
        continue  # handed on
      if part.opcode == "dynamic-update-slice":
        array = array._replace(bytes=inner[part.operands[1]].arrays[0].bytes)
      total += array.hbm_bytes
    return total

  def _collective(
    self, one: Instruction, where: Computation
  ) -> Collective | None:
    kind = one.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
      given = sum(a.bytes for x in one.operands for a in where[x].arrays)
      channel = re.search(r"channel_id=(\d+)", one.rest)
      return Collective(
        kind, given, _group(one.rest), int(channel[1]) if channel else 0
      )
    if kind not in ("fusion", "async"):
      return None
    for name in _called(one):
      inner = self.computations[name]
      cut = any(nested.opcode == "dynamic-slice" for nested in inner.values())
      for nested in inner.values():
        found = self._collective(nested, inner)
        if found and found.kind == "all-reduce" and cut:
          # As TPUs write it; their channels are not numbered.
          return found._replace(kind="reduce-scatter", channel=0)
        if found:
          return found._replace(begins=found.begins or _begins(inner))
    return None


def _begins(computation: Computation) -> bool:
  """Whether a fusion begins what goes on beside others."""
  return any(
    'custom_call_target="AsyncCollectiveStart"' in one.rest
    for one in computation.values()
  )


def _element(whole: Instruction, index: int) -> str:
  """The name of a tuple's element; none where something else makes it."""
  return whole.operands[index] if whole.opcode == "tuple" else ""


def _increase(name: str, where: Computation) -> int:
  """By how much a loop's body increases a number; 1 where that is not said."""
  total, todo = 0, [name]
  while todo:
    one = where.get(todo.pop())
    if one and one.opcode == "constant":
      total += int(one.inside)
    elif one and one.opcode in ("add", "copy"):
      todo += one.operands
  return total or 1


def _part(loop: Instruction, name: str) -> str:
  """The computation that is a loop's `body` or its `condition`."""
  return re.search(rf"{name}=%?([\w.\-]+)", loop.rest)[1]


def _called(one: Instruction) -> list[str]:
  """Names of the computations that an instruction runs; a loop's apart."""
  branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
  if branches:
    return [name.strip().lstrip("%") for name in branches[1].split(",")]
  if one.opcode in ("fusion", "call", "async-start"):
    return _CALLS.findall(one.rest)
  return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)


def _group(attributes: str) -> int:
  """Number of devices in a group; 0 where it is not said."""
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
  if iota:
    return int(iota[2])
  mesh = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\)\))? ?\{([^}]*)\}",
    attributes,
  )
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  return len(listed[1].split(",")) if listed else 0


def _passes(one: Instruction, sides: list[Array]) -> int:
  """How many products of bfloat16 a TPU makes one of."""
  asked = re.search(r"operand_precision=\{(\w+),", one.rest)
  exact = all(4 * math.prod(side.dims) == side.bytes for side in sides)
  return _PASSES.get(asked[1], 1) if asked and exact else 1


def _dot(
  one: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> int:
  """Operations of a product as others than TPUs write it."""
  del right  # what is summed over is in both
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1]
  depth = math.prod(left[int(i)] for i in contracted.split(",") if i)
  return 2 * math.prod(one.arrays[0].dims) * depth


def _convolution(
  one: Instruction, image: tuple[int, ...], kernel: tuple[int, ...]
) -> int:
  """Operations of a convolution, those with padding left out.

  TPUs write products of matrices as convolutions, batches as dilated windows.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
  lhs, rhs, out = labels.groups()
  window = re.search(r"window=\{([^}]*)\}", one.rest)
  fields = dict(f.split("=") for f in window[1].split()) if window else {}
  result = one.arrays[0].dims
  count = result[out.index("b")] * result[out.index("f")]
  count *= kernel[rhs.index("i")]
  for i in range(len(lhs) - 2):
    place = str(i)

    def field(name, default, i=i):
      return fields[name].split("x")[i] if name in fields else default

    stride, spread = int(field("stride", 1)), int(field("lhs_dilate", 1))
    before = int(str(field("pad", "0_0")).split("_")[0])
    taps = np.arange(kernel[rhs.index(place)]) * int(field("rhs_dilate", 1))
    at = np.arange(result[out.index(place)])[:, None] * stride + taps - before
    last = (image[lhs.index(place)] - 1) * spread
    count *= int(np.sum((at >= 0) & (at <= last) & (at % spread == 0)))
  return 2 * count
