"""What accelerators can do, as their makers say: for utilisation and plans.

A figure is that of one device as JAX counts them, for matrices that are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Chip(NamedTuple):
  """A kind of device.

  Attributes:
    flops: operations a second of bfloat16 products, summed in float32.
    memory: bytes of its own that programs may use.
    bandwidth: bytes a second, from and to that memory.
    link: bytes a second of one link to other chips, one way.
    links: their number.
    ring: how many chips along an axis of a slice are joined to a ring; fewer
      are a line. 0 where chips have no axes.
  """

  flops: float
  memory: float
  bandwidth: float
  link: float
  links: int
  ring: int = 0


_GIB = 2**30

# Of the memory of a v5e and a v6e, 16 and 32 GiB, XLA keeps some to itself
# (libtpu 0.0.42.1: "exceeds available HBM (15.75G)"), and of a v4's 32
# ("Used 63.80G of 30.75G hbm").

# https://docs.cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023, "TPU
# v4", table 4.
_V4 = Chip(275e12, 30.75 * _GIB, 1200e9, 50e9, 6, ring=4)
# https://docs.cloud.google.com/tpu/docs/v5e: 400 GB/s both ways, over 4 ports.
# Rings: Austin et al. 2025, "How to Scale Your Model", section 2.
_V5E = Chip(197e12, 15.75 * _GIB, 819e9, 50e9, 4, ring=16)
# https://docs.cloud.google.com/tpu/docs/v5p: 1,200 GB/s both ways, a 3D torus
# from 4 x 4 x 4 on.
_V5P = Chip(459e12, 95 * _GIB, 2765e9, 100e9, 6, ring=4)
# https://docs.cloud.google.com/tpu/docs/v6e: 800 GB/s both ways, over 4 ports.
_V6E = Chip(918e12, 31.25 * _GIB, 1638e9, 100e9, 4, ring=16)
# https://docs.cloud.google.com/tpu/docs/tpu7x: 2,307 TFLOP/s, 192 GiB, 7,380
# GB/s, and 1,200 GB/s both ways, of a chip, which is two devices.
_V7X = Chip(2307e12 / 2, 96 * _GIB, 7380e9 / 2, 100e9 / 2, 6, ring=4)

# A GPU is kept by the name that its driver gives.
CHIPS = {
  "TPU v4": _V4,
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "TPU7x": _V7X,
  # https://www.nvidia.com/en-us/data-center/a100: 12 links, 600 GB/s both ways.
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 25e9, 12),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 25e9, 12),
  # https://www.nvidia.com/en-us/data-center/h100 (1,979 TFLOP/s if sparse); 18
  # links, 900 GB/s both ways.
  "NVIDIA H100 80GB HBM3": Chip(1979e12 / 2, 80e9, 3350e9, 25e9, 18),
  # https://www.nvidia.com/en-us/data-center/h200
  "NVIDIA H200": Chip(1979e12 / 2, 141e9, 4800e9, 25e9, 18),
  # https://www.nvidia.com/en-us/data-center/hgx: eight have 36 PFLOP/s if
  # sparse, 1.4 TB, 62 TB/s; 18 links, 1.8 TB/s both ways.
  "NVIDIA B200": Chip(4500e12 / 2, 180e9, 7700e9, 50e9, 18),
}


def get(device_kind: str) -> Chip | None:
  """Returns what is known of a `jax.Device.device_kind`, or None."""
  return CHIPS.get(device_kind)


def links(chip: Chip, shape: Sequence[int]) -> int:
  """Counts the links of the chip of a slice that has fewest: in a corner.

  All chips send as much, so this one is ready last.

  Args:
    chip: of which the slice is made.
    shape: of the slice, chips along each axis.
  """
  joined = [n >= chip.ring for n in shape]
  if chip.links == 6 and not all(joined):  # optical links are between cubes
    joined = [False] * len(shape)
  ends = [2 if ring else 1 for ring in joined]
  return sum(end for n, end in zip(shape, ends, strict=True) if n > 1)
