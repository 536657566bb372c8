"""Tables that say how another project's tensors are ours, both ways.

Each rule of a table says which of their tensors hold which of our parameters.
The same table loads and stores, and knows every name and shape, so that
nothing is forgotten and nothing is left over. Parameters of a stack's layers
are one array here, and a tensor each there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from vlp_jax.errors import UserError

State = Mapping[str, np.ndarray]


class Part(NamedTuple):
  """A parameter, as a part of their tensor.

  Attributes:
    path: of the parameter, joined by "/".
    ours: its shape, without the axis of layers.
    theirs: the part's shape.
    axes: the part, transposed by these, is the parameter reshaped.
  """

  path: str
  ours: tuple[int, ...]
  theirs: tuple[int, ...]
  axes: tuple[int, ...]

  def load(self, part: np.ndarray) -> np.ndarray:
    """Makes the parameter of the part."""
    return part.transpose(self.axes).reshape(self.ours)

  def store(self, array: np.ndarray) -> np.ndarray:
    """Makes the part of the parameter."""
    shape = [self.theirs[axis] for axis in self.axes]
    return array.reshape(shape).transpose(np.argsort(self.axes))


class Rule(NamedTuple):
  """Tensors of theirs and what they hold, along their first axis.

  Attributes:
    tensors: their names, nearly always one; several are of equal shape, and
      mean their concatenation. "{}" stands for the number of the layer.
    parts: what they consist of, one after the other.
    depth: number of layers that have them; 0 if they are no part of a stack.
  """

  tensors: tuple[str, ...]
  parts: tuple[Part, ...]
  depth: int = 0

  @property
  def names(self) -> list[tuple[str, ...]]:
    """The tensors' names, layer by layer."""
    if not self.depth:
      return [self.tensors]
    layers = range(self.depth)
    return [tuple(t.format(i) for t in self.tensors) for i in layers]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of each tensor."""
    first = self.parts[0].theirs
    if len(self.parts) == len(self.tensors) == 1:
      return first
    rows = sum(part.theirs[0] for part in self.parts)
    return (rows // len(self.tensors), *first[1:])

  def cut(self, tensors: list[np.ndarray]) -> list[np.ndarray]:
    """Makes the parts of a layer's tensors."""
    if len(self.parts) == len(tensors) == 1:
      return tensors
    ends = np.cumsum([part.theirs[0] for part in self.parts])
    return np.split(np.concatenate(tensors), ends[:-1])

  def join(self, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Makes a layer's tensors of the parts."""
    if len(parts) == len(self.tensors) == 1:
      return parts
    return np.split(np.concatenate(parts), len(self.tensors))


Rules = list[Rule]


def load(rules: Rules, state: State) -> dict[str, Any]:
  """Makes parameters of a state dict, every tensor of which is used once.

  Returns:
    Nested dicts of float32 arrays.

  Raises:
    UserError: if tensors are missing, left over, or of another shape.
  """
  expected = {
    name: rule.shape for rule in rules for names in rule.names for name in names
  }
  _check("the state dict", expected, state)
  params = {}
  for rule in rules:
    layers = [
      rule.cut([np.array(state[name], np.float32) for name in names])
      for names in rule.names
    ]
    for i, part in enumerate(rule.parts):
      loaded = [part.load(layer[i]) for layer in layers]
      params[part.path] = np.stack(loaded) if rule.depth else loaded[0]
  return traverse_util.unflatten_dict(params, sep="/")


def store(rules: Rules, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Does the inverse of `load`; every parameter is used once.

  Raises:
    UserError: as `load` does.
  """
  arrays = traverse_util.flatten_dict(dict(params), sep="/")
  expected = {
    part.path: (rule.depth, *part.ours) if rule.depth else part.ours
    for rule in rules
    for part in rule.parts
  }
  _check("the parameters", expected, arrays)
  state = {}
  for rule in rules:
    for layer, names in enumerate(rule.names):
      parts = []
      for part in rule.parts:
        array = np.asarray(arrays[part.path], np.float32)
        parts.append(part.store(array[layer] if rule.depth else array))
      for name, tensor in zip(names, rule.join(parts), strict=True):
        state[name] = np.array(tensor, order="C")
  return state


def _check(
  what: str, expected: Mapping[str, tuple], arrays: Mapping[str, Any]
) -> None:
  """Raises a `UserError` unless names and shapes are the expected ones."""
  problems = []
  if missing := sorted(expected.keys() - arrays.keys()):
    problems.append(f"missing: {', '.join(missing)}")
  if left := sorted(arrays.keys() - expected.keys()):
    problems.append(f"left over: {', '.join(left)}")
  wrong = [
    f"{name} {np.shape(arrays[name])} instead of {shape}"
    for name, shape in expected.items()
    if name in arrays and np.shape(arrays[name]) != shape
  ]
  if wrong:
    problems.append(f"of another shape: {', '.join(wrong)}")
  if problems:
    raise UserError(f"{what} and the config do not fit; {'; '.join(problems)}")


# --- What rules are made of -------------------------------------------------


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> Rules:
  """Puts rules of a module under the names that it has as a part.

  An empty name is none: the module's parts are then the whole's.
  """

  def join(separator, *names):
    return separator.join(filter(None, names))

  def moved(rule):
    tensors = tuple(join(".", theirs, name) for name in rule.tensors)
    parts = [p._replace(path=join("/", ours, p.path)) for p in rule.parts]
    return rule._replace(tensors=tensors, parts=tuple(parts))

  return [moved(rule) for rule in rules]


def stack(theirs: str, ours: str, depth: int, block: Rules) -> Rules:
  """Rules of a stack's layers, from those of one."""
  rules = under(theirs + ".{}", f"{ours}/layers", block)
  return [rule._replace(depth=depth) for rule in rules]


def part(path, ours: tuple[int, ...], theirs=None) -> Part:
  """A part that is not transposed; `theirs` defaults to `ours`."""
  theirs = ours if theirs is None else theirs
  return Part(path, ours, theirs, tuple(range(len(theirs))))


def same(theirs: str, ours: str, shape: tuple[int, ...]) -> Rule:
  """A tensor that is a parameter as it is."""
  return Rule((theirs,), (part(ours, shape),))


def norm(width: int) -> Rules:
  """A layer norm."""
  return [same("weight", "scale", (width,)), same("bias", "bias", (width,))]


def linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Rules:
  """PyTorch's `Linear`, and a `DenseGeneral` over these axes."""
  shape = (math.prod(outputs), math.prod(inputs))
  return [
    Rule(("weight",), (Part("kernel", inputs + outputs, shape, (1, 0)),)),
    Rule(("bias",), (part("bias", outputs, shape[:1]),)),
  ]


def patches(size: int, width: int) -> Rule:
  """The kernel of a convolution: OIHW there, HWIO here."""
  kernel = Part(
    "kernel", (size, size, 3, width), (width, 3, size, size), (2, 3, 1, 0)
  )
  return Rule(("weight",), (kernel,))


def packed(width: int, heads: int, **counts: int) -> Rules:
  """PyTorch's one matrix for query, key and value: `in_proj_*`.

  Args:
    width: channels.
    heads: number of heads.
    **counts: the modules that they are made by here, in this order, and how
      many of the three each makes.
  """
  head = (heads, width // heads)
  parts = []
  for name, count in counts.items():
    outputs = head if count == 1 else (count, *head)
    dense = under("", name, linear((width,), outputs))
    parts.append([rule.parts[0] for rule in dense])
  weights, biases = zip(*parts, strict=True)
  return [
    Rule(("in_proj_weight",), weights),
    Rule(("in_proj_bias",), biases),
  ]


def attention(width: int, heads: int, **counts: int) -> Rules:
  """PyTorch's `MultiheadAttention`; see `packed`."""
  head = (heads, width // heads)
  out = under("out_proj", "out/proj", linear(head, (width,)))
  return [*packed(width, heads, **counts), *out]


def mlp(tower, up: str, down: str) -> Rules:
  """Two `Linear`s, by their names; of a section with widths."""
  width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
  return [
    *under(up, "up", linear((width,), (hidden,))),
    *under(down, "down", linear((hidden,), (width,))),
  ]


def resblock(tower, mlp_norm: str = "mlp_norm", mlp_name: str = "mlp") -> Rules:
  """CLIP's `ResidualAttentionBlock` as self-attention.

  Args:
    tower: a section with `width`, `num_heads` and `mlp_ratio`.
    mlp_norm: what the norm of its MLP is called here.
    mlp_name: what the MLP is called here.
  """
  own = attention(tower.width, tower.num_heads, qkv=3)
  return [
    *under("ln_1", "self_norm", norm(tower.width)),
    *under("attn", "self_attention", own),
    *under("ln_2", mlp_norm, norm(tower.width)),
    *under("mlp", mlp_name, mlp(tower, "c_fc", "c_proj")),
  ]
