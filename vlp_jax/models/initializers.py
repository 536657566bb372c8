"""Initialisation of transformer blocks, by name of the scheme.

- `clip`: normal; every branch that writes to the residual stream is scaled by
  the number of such branches (Radford et al. 2021, as published).
- `torch`: what PyTorch's layers default to, and with it open_clip's vision
  towers: Xavier over the packed query-key-value matrix, U(-1, 1) / sqrt(fan
  in) elsewhere.
- `xavier`: Xavier per matrix and zero biases, as in MAE's decoder.
- `bert`: N(0, 0.02^2) and zero biases (Devlin et al. 2019, as published).
"""

import dataclasses

import jax
from flax import linen as nn

Initializer = jax.nn.initializers.Initializer
SCHEMES = ("clip", "torch", "xavier", "bert")


def uniform(bound: float) -> Initializer:
  """Returns an initializer of U(-bound, bound)."""

  def init(key, shape, dtype=float):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def normal(std: float) -> Initializer:
  """Returns an initializer of N(0, std^2)."""
  return nn.initializers.normal(std)


@dataclasses.dataclass(frozen=True)
class BlockInit:
  """The initializers of one transformer block.

  Attributes:
    scheme: one of `SCHEMES`.
    width: channels of the residual stream.
    branches: residual branches of the whole stack (for `clip`).
  """

  scheme: str
  width: int
  branches: int

  def __post_init__(self):
    if self.scheme not in SCHEMES:
      raise ValueError(f"init {self.scheme!r} is none of {SCHEMES}")

  def project(self) -> Initializer:
    """Query, key and value matrices; the first axis is the fan in."""
    if self.scheme == "bert":
      return normal(0.02)

    def init(key, shape, dtype=float):
      fan_in = shape[0]
      if self.scheme == "clip":
        return normal(fan_in**-0.5)(key, shape, dtype)
      # PyTorch packs three matrices into one tensor before it counts.
      fan_out = self.width * (3 if self.scheme == "torch" else 1)
      return uniform((6 / (fan_in + fan_out)) ** 0.5)(key, shape, dtype)

    return init

  def write(self, fan_in: int) -> Initializer:
    """Matrices that write to the residual stream."""
    if self.scheme == "bert":
      return normal(0.02)
    if self.scheme == "clip":
      return normal((self.width * self.branches) ** -0.5)
    if self.scheme == "torch":
      return uniform(fan_in**-0.5)
    return uniform((6 / (fan_in + self.width)) ** 0.5)

  def up(self, hidden: int) -> Initializer:
    """The first matrix of the MLP."""
    if self.scheme == "bert":
      return normal(0.02)
    if self.scheme == "clip":
      return normal((2 * self.width) ** -0.5)
    if self.scheme == "torch":
      return uniform(self.width**-0.5)
    return uniform((6 / (hidden + self.width)) ** 0.5)

  def mlp_bias(self, fan_in: int) -> Initializer:
    """Biases of the MLP; attention's biases are zero in every scheme."""
    if self.scheme in ("xavier", "bert"):
      return nn.initializers.zeros
    return uniform(fan_in**-0.5)
