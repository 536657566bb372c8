"""What attention costs by XLA and by fused kernels.

  python -m benchmarks.attention          compiles for a TPU v5e; pip: jax[tpu]
  python -m benchmarks.attention --time   times them on the device that is here

The first needs no TPU: libtpu compiles ahead of time on a CPU. Of a stack of
four layers, looped, forward and backward, one line a kernel: the memory beside
arguments and results; the bytes that XLA says its instructions read and write,
wherever these are; and cycles of one layer, which are XLA's own estimates for
its instructions and, for the kernel, the instruction words of a program times
the number of programs. No clock was involved. `flash` is jax's own kernel, on
sequences padded to whole registers, attention alone; it drops no probabilities.
One line of JSON is added to `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import flash_attention as flash

from benchmarks import rounds
from vlp_jax.models.transformer import Transformer
from vlp_jax.ops import attention, platforms, tpu_attention
from vlp_jax.ops.dropout import Drop
from vlp_jax.ops.masks import Mask


class Shape(NamedTuple):
  """A stack: examples a chip, tokens, heads of 64 channels, dropout's rate."""

  batch: int
  tokens: int
  heads: int
  causal: bool = False
  dropout: float = 0.0


SHAPES = {
  "ViT-L/14, 224 pixels": Shape(8, 257, 16),
  "ViT-L/14, 224 pixels, more a chip": Shape(64, 257, 16),
  "ViT-L/14, 336 pixels": Shape(8, 577, 16),
  "caption decoder": Shape(8, 76, 12, causal=True),
  "SCL's stream of patches, dropout": Shape(48, 257, 16, dropout=0.1),
}
CHANNELS, DEPTH = 64, 4
PACKAGES = ("jax", "jaxlib", "libtpu", "flax")


def main() -> None:
  parser = rounds.parser("attention", __doc__)
  parser.add_argument("--time", action="store_true")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--words", default="", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.words:
    print(json.dumps(words(*json.loads(options.words))))
    return
  if options.time:
    found = {"ratios": {name: ratios(name, options.rounds) for name in SHAPES}}
  else:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    found = {"compiled": compiled()}
  record = rounds.record("attention", PACKAGES, found)
  rounds.show_machine(record["machine"])
  show(record)
  rounds.keep(record, options.output)


def kernels_for(shape: Shape) -> tuple[str, ...]:
  """Names the kernels of TPUs that can do it."""
  return ("tpu",) if shape.dropout else ("tpu", "flash")


def gradients(kernel: str, shape: Shape):
  """Returns a function of q, k, v and the output's gradient: all gradients."""
  mask = Mask(causal=shape.causal)

  def run(q, k, v, g):
    key = jax.random.key(0)
    dropout = Drop(shape.dropout, key) if shape.dropout else None

    def attend(*x):
      if kernel == "flash":
        return flash_padded(*x, mask)
      if kernel == "tpu":
        return tpu_attention.attend(*x, mask, dropout)
      return attention.attend(
        *x, mask, dropout=dropout, read=False, kernel=kernel
      )[0]

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(g)

  return run


def flash_padded(q, k, v, mask: Mask) -> jax.Array:
  """jax's kernel, as one block a head; it wants multiples of 128 tokens."""
  tokens = q.shape[1]
  size = -(-tokens // 128) * 128
  q, k, v = (
    jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - tokens), (0, 0)))
    for x in (q, k, v)
  )
  names = "q k_major k q_major_dkv k_major_dkv k_dkv q_dkv k_major_dq k_dq q_dq"
  blocks = {f"block_{name}": size for name in names.split()}
  real = jnp.broadcast_to(jnp.arange(size) < tokens, (len(q), size))
  segments = flash.SegmentIds(*[real.astype(jnp.int32)] * 2)
  out = flash.flash_attention(
    *(q, k, v),
    segment_ids=segments,
    causal=mask.causal,
    sm_scale=CHANNELS**-0.5,
    block_sizes=flash.BlockSizes(block_b=1, **blocks),
  )
  return out[:, :, :tokens].swapaxes(1, 2)


def on_v5e():
  """Returns a sharding that means: on one chip of a TPU v5e."""
  found = topologies.get_topology_desc("v5e:2x2", platform="tpu")
  mesh = jax.sharding.Mesh(found.devices[:1], ("data",))
  return jax.NamedSharding(mesh, jax.P())


def abstract(tree, chip):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), tree
  )


def compiled() -> dict:
  """Returns what is known of each shape and kernel before anything runs."""
  # First of all: one process at a time may have libtpu.
  kernels = {
    name: {kernel: count_words(kernel, name) for kernel in kernels_for(shape)}
    for name, shape in SHAPES.items()
  }
  found = {}
  for name, words_of in kernels.items():
    x = {kernel: stack(kernel, name) for kernel in ("xla", "tpu")}
    x["tpu"]["cycles"] += words_of["tpu"]
    found[name] = {**x, "kernels": words_of}
  return found


def stack(kernel: str, name: str) -> dict:
  """Compiles a stack, forward and backward, for one chip."""
  shape = SHAPES[name]
  width = shape.heads * CHANNELS
  model = Transformer(
    *(width, DEPTH, shape.heads),
    dropout=shape.dropout,
    dtype=jnp.bfloat16,
    attention=kernel,
  )
  chip, mask = on_v5e(), Mask(causal=shape.causal)
  x = jax.ShapeDtypeStruct((shape.batch, shape.tokens, width), jnp.bfloat16)
  params = jax.eval_shape(model.init, jax.random.key(0), x)

  def loss(params, x):
    rngs = {"dropout": jax.random.key(0)}
    out = model.apply(params, x, mask, rngs=rngs)
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

  with attention.choices() as found, platforms.compiling_for("tpu"):
    lowered = jax.jit(jax.grad(loss)).lower(*abstract((params, x), chip))
  assert {choice.kernel for choice in found} == {kernel}, found
  program = lowered.compile()
  cycles = re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())
  return {
    "temp_MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
    "accessed_GB": program.cost_analysis()["bytes accessed"] / 1e9,
    "cycles": sum(map(int, cycles)),
  }


def count_words(kernel: str, name: str) -> int:
  """Counts in a process of its own, whose compiler writes down what it does."""
  with tempfile.TemporaryDirectory() as folder:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    wanted = f"--words={json.dumps([kernel, name, folder])}"
    out = subprocess.run(
      [sys.executable, "-m", __spec__.name, wanted],
      env={**os.environ, "LIBTPU_INIT_ARGS": flags},
      capture_output=True,
      check=True,
    ).stdout
  return json.loads(out.splitlines()[-1])


def words(kernel: str, name: str, folder: str) -> int:
  """Returns the instruction words of all programs, forward and backward."""
  shape = SHAPES[name]
  batch, tokens, heads = shape[:3]
  x = jax.ShapeDtypeStruct((batch, tokens, heads, CHANNELS), jnp.bfloat16)
  function = jax.jit(gradients(kernel, shape))
  program = function.lower(*abstract([x] * 4, on_v5e())).compile()
  line = r"%(\S+) = .* custom-call\(.*tpu_custom_call"
  found = 0
  for call in re.findall(line, program.as_text()):
    (file,) = pathlib.Path(folder).glob(
      f"*-{call}-*schedule-analysis_final_bundles.txt"
    )
    found += int(
      re.search(r"total scheduled bundles:\s*(\d+)", file.read_text())[1]
    )
  return found * batch * (heads // 2 if kernel == "tpu" else heads)


def ratios(name: str, count: int) -> dict:
  """Times each kernel that runs here; returns ratios to XLA, by round."""
  shape = SHAPES[name]
  own = {"cuda": () if shape.dropout else ("cudnn",), "tpu": kernels_for(shape)}
  kernels = ("xla", *own.get(platforms.platform(), ()))
  size = (4, *shape[:3], CHANNELS)
  made = jax.random.normal(jax.random.key(0), size, jnp.bfloat16)
  functions = {k: jax.jit(gradients(k, shape)) for k in kernels}
  seconds = {kernel: [] for kernel in kernels}
  for number in range(count + 1):
    for kernel, function in functions.items():
      begin = time.perf_counter()
      for _ in range(10 if number else 1):
        out = function(*made)
      jax.block_until_ready(out)
      if number:  # the first compiles
        seconds[kernel].append(time.perf_counter() - begin)
  pairs = {k: zip(v, seconds["xla"], strict=True) for k, v in seconds.items()}
  return {k: statistics.median(a / b for a, b in v) for k, v in pairs.items()}


def show(record: dict) -> None:
  """Prints a record as tables."""
  for name, found in record.get("compiled", {}).items():
    print(f"\n{name:36}{'temp MiB':>10}{'GB':>8}{'Mcycles a layer':>17}")
    for kernel in ("xla", "tpu"):
      x = found[kernel]
      print(
        f"  {kernel:34}{x['temp_MiB']:>10.0f}{x['accessed_GB']:>8.2f}"
        f"{x['cycles'] / 1e6:>17.2f}"
      )
    for kernel, cycles in found["kernels"].items():
      print(f"  {kernel}, attention alone{cycles / 1e6:>{52 - len(kernel)}.2f}")
  for name, found in record.get("ratios", {}).items():
    values = ", ".join(f"{kernel} {x:.2f}" for kernel, x in found.items())
    print(f"{name}: time over XLA's: {values}")


if __name__ == "__main__":
  main()
