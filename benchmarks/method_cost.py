"""What a step of SIMLA and of SCL costs: ours, and with their releases' calls.

  python -m benchmarks.method_cost             operations, ten minutes
  python -m benchmarks.method_cost --time=tiny seconds of a step, instead
  python -m benchmarks.method_cost --time=b16 --method=simla --steps=1
  python -m benchmarks.method_cost --method=scl

Beside SIMLA stands ALBEF, beside SCL what it is without completion (CL, ITM and
MLM), and GLSCL. Operations are XLA's own count (multiplications and additions,
before it optimises) of the forward pass, and of forward and backward passes, a
sample: at the paper's size, at `tiny`, and of SCL for clips of four frames of
224 pixels. Layers are unrolled, since a loop's body would be counted once. The
optimizer, the average and the tokenizer of patches are left out, which all
variants share. Before anything is counted, ours and the release's calls have
to agree in every loss to 1e-5 at `tiny`, dropout off. One line of JSON is added
to `--output`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rounds
from benchmarks.scl_release_calls import SclReleaseCalls
from benchmarks.simla_release_calls import SimlaReleaseCalls
from vlp_jax import config as config_lib
from vlp_jax import step_memory, train_state
from vlp_jax.methods import base
from vlp_jax.methods.base import Context
from vlp_jax.ops import rng


class Variant(NamedTuple):
  """A way to compute a step.

  Attributes:
    config: of `configs/`.
    items: what is changed in it.
    calls: the class that makes the release's calls; None makes ours.
  """

  config: str
  items: tuple[str, ...] = ()
  calls: type | None = None


_FUSION = ("model.stream.dropout=0.0", "method.queue_size=1024")
_SIMLA = Variant("simla", (*_FUSION, "method.visual_tokenizer=patches"))
_SCL = Variant(
  "scl",
  (
    *("model.text.dropout=0.0", "model.fusion.dropout=0.0"),
    *("accumulate=1", "method.match_group=0"),
  ),
)
_BASELINE = (*_SCL.items, "method.vision_weight=0", "method.language_weight=0")
_GLSCL = (*_SCL.items, "method.patch_weight=0.2", "method.token_weight=0.2")
METHODS = {
  "simla": {
    "simla": _SIMLA,
    "simla_release": _SIMLA._replace(calls=SimlaReleaseCalls),
    "albef": Variant("albef", _FUSION),
  },
  "scl": {
    "scl": _SCL,
    "scl_release": _SCL._replace(calls=SclReleaseCalls),
    "baseline": Variant("scl", _BASELINE),
    "baseline_release": Variant("scl", _BASELINE, SclReleaseCalls),
    "glscl": Variant("scl", _GLSCL),
    "glscl_release": Variant("scl", _GLSCL, SclReleaseCalls),
  },
}
VARIANTS = {k: v for table in METHODS.values() for k, v in table.items()}
RATIOS = {
  "SIMLA / its release": ("simla", "simla_release", "<= 0.75 of a step"),
  "SIMLA / ALBEF": ("simla", "albef", ""),
  "SCL / its release": ("scl", "scl_release", "<= 0.58 of the forward pass"),
  "without completion / release": ("baseline", "baseline_release", ""),
  "GLSCL / its release": ("glscl", "glscl_release", ""),
  "SCL / release without completion": ("scl", "baseline_release", ""),
}
# A size of the config, and what is changed in it.
SIZES = {
  "b16": ("b16", ()),
  "tiny": ("tiny", ()),
  "b16_clips": ("b16", ("data.num_frames=4", "data.image_size=224")),
  "tiny_clips": ("tiny", ("data.num_frames=4",)),
}
# What is counted of each method, and where ours and the release's are compared.
COUNTED = {"simla": ("b16", "tiny"), "scl": ("b16", "tiny", "b16_clips")}
COMPARED = {"simla": ("tiny",), "scl": ("tiny", "tiny_clips")}
# What is timed, and the examples of a step.
TIMED = {"tiny": 32, "b16": 2}
# Options of XLA that compile fast what runs once.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
PACKAGES = ("jax", "flax")


def main() -> None:
  parser = rounds.parser("method_cost", __doc__)
  parser.add_argument("--method", choices=METHODS, help="default: all")
  parser.add_argument("--time", choices=TIMED, help="at this size")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=8, help="a round")
  parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    step_memory.stay_in_main_thread()
    rounds.serve({}, runner(options.worker, options.time))
    return
  methods = [options.method] if options.method else list(METHODS)
  if options.time:
    found = seconds(options, [x for m in methods for x in METHODS[m]])
  else:
    found = operations(methods)
  record = rounds.record("method_cost", PACKAGES, found)
  rounds.show_machine(record["machine"])
  show(record)
  rounds.keep(record, options.output)


def operations(methods: list[str]) -> dict:
  """Counts the operations of methods' variants, after a comparison."""
  found = {"forward": {}, "operations": {}}
  for method in methods:
    check_equal(method)
    for size in COUNTED[method]:
      for name in METHODS[method]:
        forward, step = count(name, size)
        found["forward"].setdefault(size, {})[name] = forward
        found["operations"].setdefault(size, {})[name] = step
  return found


def build(name: str, size: str, batch_size: int, scan: bool = False):
  """Returns a variant's method and config, without dropout and rounding."""
  variant, (size, changes) = VARIANTS[name], SIZES[size]
  items = [
    f"batch_size={batch_size}",
    f"model.scan={str(scan).lower()}",
    "model.remat=none",
    "model.dtype=float32",
    *variant.items,
    *changes,
  ]
  config = config_lib.load(f"configs/{variant.config}.py:{size}", items)
  method = base.get(variant.config, config)
  if variant.calls:
    method = with_calls(variant.calls, method)
  return method, config


def with_calls(calls: type, method):
  """Returns a method of the class `calls`, with the fields of another."""
  fields = dataclasses.fields(method)
  return calls(**{f.name: getattr(method, f.name) for f in fields})


def losses(method):
  """Returns a function of parameters, batch and context: the sum, and each."""

  def loss(params, batch, ctx):
    ctx = ctx._replace(train=True)
    out = method.forward(params, batch, ctx)
    coupled = method.couple(params, out.shared, batch, ctx)
    terms = {**out.terms, **coupled.terms}
    values = {k: m.total / jnp.maximum(m.weight, 1) for k, m in terms.items()}
    return sum(values.values()), values

  return loss


def gradient(method):
  """Returns a function of the same: the losses, and the sum's gradient."""
  return jax.value_and_grad(losses(method), has_aux=True)


def inputs(method, config):
  """Makes parameters, a batch and a context, to be traced or run."""
  spec = train_state.batch_spec(config)
  zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in spec.items()}
  params, state = method.init(jax.random.key(0), zeros)
  teacher = None
  if method.uses_ema:
    teacher = method.init(jax.random.key(1), zeros)[0]
  draw = jax.random.key(2)
  size, length = spec["text"].shape
  text = jax.random.randint(
    draw, (size, length), 4, config.tokenizer.vocab_size
  )
  pixels = jax.random.bits(draw, spec["image"].shape, jnp.uint8)
  batch = dict(
    image=pixels,
    text=text.astype(jnp.int32),
    text_len=jnp.full(size, length, jnp.int32),
    image_id=jnp.arange(size, dtype=jnp.int32),
    index=jnp.arange(size, dtype=jnp.int32),
  )
  if "visual_tokenizer" in state:
    shape = state["visual_tokenizer"]["centroids"].shape
    state["visual_tokenizer"] = {"centroids": jax.random.normal(draw, shape)}
  step = jnp.int32(10**6)  # the teacher has its whole weight
  key = jax.random.key(3)
  return (
    params,
    batch,
    Context(step, rng.streams(key, step), teacher, state, True),
  )


def count(name: str, size: str, batch_size: int = 4) -> tuple[float, float]:
  """Returns GFLOP a sample: of the forward pass, and with the backward pass."""
  method, config = build(name, size, batch_size)
  made = jax.eval_shape(lambda: inputs(method, config))

  def gflop(function):
    lowered = jax.jit(function).lower(*made)
    return lowered.cost_analysis()["flops"] / batch_size / 1e9

  return gflop(losses(method)), gflop(gradient(method))


def check_equal(method: str) -> None:
  """Raises unless ours and the release's calls agree, in every loss."""
  table = METHODS[method]
  for ours in table:
    if (release := f"{ours}_release") in table:
      for size in COMPARED[method]:
        _compare(ours, release, size)


def _compare(ours: str, release: str, size: str) -> None:
  method, config = build(ours, size, 8)
  made = jax.jit(lambda: inputs(method, config), compiler_options=FAST)()
  got, want = (
    jax.jit(losses(x), compiler_options=FAST)(*made)[1]
    for x in (method, build(release, size, 8)[0])
  )
  assert got.keys() == want.keys(), (ours, got.keys(), want.keys())
  for name, value in got.items():
    np.testing.assert_allclose(
      value, want[name], rtol=0, atol=1e-5, err_msg=f"{ours}, {name}"
    )


def runner(name: str, size: str):
  """Returns a function that runs so many steps."""
  method, config = build(name, size, TIMED[size], scan=size != "tiny")
  made = jax.jit(lambda: inputs(method, config))()
  step = jax.jit(gradient(method))
  jax.block_until_ready(step(*made))

  def run(steps: int) -> None:
    for _ in range(steps):
      jax.block_until_ready(step(*made))

  return run


def seconds(options, names: list[str]) -> dict:
  """Times variants, in turn."""

  def start(name: str) -> rounds.Worker:
    environ = dict(os.environ)
    environ = step_memory.environment(environ) or environ
    return rounds.Worker(__spec__.name, name, environ)

  _, times = rounds.compare(names, start, options.rounds, options.steps)
  return {
    "size": options.time,
    "examples": TIMED[options.time],
    "milliseconds": {k: 1e3 * statistics.median(v) for k, v in times.items()},
    "ratios": rounds.ratios(RATIOS, times),
  }


def show(record: dict) -> None:
  """Prints a record as tables."""
  for size, steps in record.get("operations", {}).items():
    forward = record["forward"][size]
    print(f"\nGFLOP a sample, {size:15}{'forward':>12}{'and backward':>14}")
    for name, value in steps.items():
      print(f"{name:32}{forward[name]:>11.3f}{value:>14.3f}")
    for name, (top, bottom, aim) in RATIOS.items():
      if top in steps and bottom in steps:
        values = [x[top] / x[bottom] for x in (forward, steps)]
        aim = f"   (aim: {aim})" if aim and size == "b16" else ""
        print(f"{name:32}{values[0]:>11.3f}{values[1]:>14.3f}{aim}")
  if "ratios" in record:
    size, examples = record["size"], record["examples"]
    print(f"\nmilliseconds, forward and backward, {size}, {examples} examples")
    for name, value in record["milliseconds"].items():
      print(f"{name:32}{value:>11.1f}")
    rounds.show_ratios(record["ratios"])


if __name__ == "__main__":
  main()
