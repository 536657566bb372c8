"""Reads optimised HLO as XLA prints it: computations, their instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0}


class Array(NamedTuple):
  """One array of a type: its size, and whether it lies in HBM."""

  dims: tuple[int, ...]
  bytes: int
  in_hbm: bool

  @property
  def hbm_bytes(self) -> int:
    """Its size where it lies in HBM, else 0."""
    return self.bytes if self.in_hbm else 0


class Instruction(NamedTuple):
  """A line of a computation."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  rest: str  # what stands after the operands
  inside: str  # what stands between the parentheses
  is_root: bool


# Names of instructions, to what they are.
Computation = dict[str, Instruction]


def read(text: str) -> tuple[dict[str, Computation], str]:
  """Returns the computations by name, and which of them is the program.

  Args:
    text: of `compiled.as_text()`.
  """
  found: dict[str, Computation] = {}
  entry = ""
  current: Computation = {}
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith((" ", "HloModule")):
      words = line.split()
      is_entry = words[0] == "ENTRY"
      name = words[is_entry].lstrip("%")
      current = found[name] = {}
      entry = name if is_entry else entry
    elif line.startswith("  ") and " = " in line:
      instruction = _parse(line.strip())
      current[instruction.name] = instruction
  return found, entry


def _parse(line: str) -> Instruction:
  """Reads `[ROOT] %name = type opcode(operands), attributes`."""
  line = re.sub(r"/\*.*?\*/", "", line)
  left, right = line.split(" = ", 1)
  if right.startswith("("):
    kind, right = _balanced(right)
  else:
    kind, right = right.split(" ", 1)
  opcode, right = right.strip().split("(", 1)
  inside, rest = _balanced("(" + right)
  inside = inside[1:-1]
  return Instruction(
    left.removeprefix("ROOT ").lstrip("%"),
    tuple(_arrays(kind)),
    opcode,
    tuple(re.findall(r"%([\w.\-]+)", inside)),
    rest,
    inside,
    left.startswith("ROOT "),
  )


def _balanced(text: str) -> tuple[str, str]:
  """Cuts behind the parenthesis that closes the first."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return text[: i + 1], text[i + 1 :]
  raise ValueError(f"no end of {text[:60]!r}")


def _arrays(kind: str) -> Iterator[Array]:
  """Reads types such as `bf16[8,64]{1,0:T(8,128)(2,1)S(1)}`.

  `S(1)` and above are memories on the chip, without which it is HBM.
  """
  pattern = r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?"
  for dtype, sides, layout in re.findall(pattern, kind):
    dims = tuple(int(n.lstrip("<=")) for n in sides.split(",") if n)
    space = re.search(r"S\((\d+)\)", layout)
    bits = re.search(r"\d+", dtype)
    size = _BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
    # Bits before the underscore or the letters of 8-bit floats: f8e4m3.
    yield Array(dims, math.ceil(math.prod(dims) * size), not space)
