"""What a step of SIMLA costs: ours, with the release's calls, and ALBEF's.

  python -m benchmarks.method_cost             operations, two minutes
  python -m benchmarks.method_cost --time      and seconds at `tiny`

Operations are XLA's own count of forward and backward passes (multiplications
and additions, before it optimises), at the paper's size and at `tiny`, a
sample; layers are unrolled, since a loop's body would be counted once. The
optimizer, the average and the tokenizer of patches are left out, which all
variants share. Before anything is counted, ours and the release's calls have
to agree in every loss to 1e-5 at `tiny`, dropout off. One line of JSON is added
to `--output`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rounds
from benchmarks.release_calls import ReleaseCalls
from vlp_jax import config as config_lib
from vlp_jax import huge_pages, train_state
from vlp_jax.methods import base
from vlp_jax.methods.base import Context
from vlp_jax.ops import rng

VARIANTS = ("simla", "release", "albef")
RATIOS = {
  "ours / the release's calls": ("simla", "release", "<= 0.75 at the paper's"),
  "SIMLA / ALBEF": ("simla", "albef", ""),
}
PACKAGES = ("jax", "flax")
RESULTS = rounds.RESULTS / "method_cost.jsonl"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--time", action="store_true")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=8, help="a round")
  parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
  parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    rounds.serve({}, runner(options.worker))
    return
  check_equal()
  found = {"operations": {s: count(s) for s in ("b16", "tiny")}}
  if options.time:
    found |= seconds(options)
  record = rounds.record("method_cost", PACKAGES, found)
  rounds.show_machine(record["machine"])
  show(record)
  rounds.keep(record, options.output)


def build(variant: str, size: str, batch_size: int):
  """Returns a variant's method and config, without dropout and rounding."""
  name = "albef" if variant == "albef" else "simla"
  items = [
    f"batch_size={batch_size}",
    "model.stream.dropout=0.0",
    "model.scan=false",
    "model.remat=none",
    "model.dtype=float32",
    "method.queue_size=1024",
  ]
  if name == "simla":
    codes = 8192 if size == "b16" else 512
    items += ["method.visual_tokenizer=patches"]
    items += [f"method.visual_vocab_size={codes}"]
  config = config_lib.load(f"configs/{name}.py:{size}", items)
  method = base.get(name, config)
  if variant == "release":
    fields = dataclasses.fields(method)
    method = ReleaseCalls(**{f.name: getattr(method, f.name) for f in fields})
  return method, config


def gradient(method):
  """Returns a function of parameters, batch and context: losses, gradient."""

  def loss(params, batch, ctx):
    ctx = ctx._replace(train=True)
    out = method.forward(params, batch, ctx)
    coupled = method.couple(params, out.shared, batch, ctx)
    terms = {**out.terms, **coupled.terms}
    values = {k: m.total / jnp.maximum(m.weight, 1) for k, m in terms.items()}
    return sum(values.values()), values

  return jax.value_and_grad(loss, has_aux=True)


def inputs(method, config):
  """Makes parameters, a batch and a context, to be traced or run."""
  spec = train_state.batch_spec(config)
  zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in spec.items()}
  params, state = method.init(jax.random.key(0), zeros)
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


def count(size: str, batch_size: int = 4) -> dict[str, float]:
  """Returns GFLOP a sample of each variant."""
  found = {}
  for variant in VARIANTS:
    method, config = build(variant, size, batch_size)
    arguments = jax.eval_shape(lambda m=method, c=config: inputs(m, c)[:2])
    ctx = jax.eval_shape(
      lambda m=method, c=config: inputs(m, c)[2]._replace(train=0)
    )
    lowered = jax.jit(gradient(method)).lower(*arguments, ctx)
    found[variant] = lowered.cost_analysis()["flops"] / batch_size / 1e9
  return found


def check_equal() -> None:
  """Raises unless ours and the release's calls agree."""
  losses = {}
  for variant in ("simla", "release"):
    method, config = build(variant, "tiny", 8)
    params, batch, ctx = inputs(method, config)
    (_, values), _ = jax.jit(gradient(method))(params, batch, ctx)
    losses[variant] = values
  for name, value in losses["simla"].items():
    np.testing.assert_allclose(
      value, losses["release"][name], rtol=0, atol=1e-5, err_msg=name
    )


def runner(variant: str):
  """Returns a function that runs so many steps at `tiny`."""
  method, config = build(variant, "tiny", 32)
  arguments = jax.jit(lambda: inputs(method, config)[:2])()
  ctx = inputs(method, config)[2]
  step = jax.jit(gradient(method))
  jax.block_until_ready(step(*arguments, ctx))

  def run(steps: int) -> None:
    found = None
    for _ in range(steps):
      found = step(*arguments, ctx)
    jax.block_until_ready(found)

  return run


def seconds(options) -> dict:
  """Times the variants at `tiny`, in turn."""

  def start(name: str) -> rounds.Worker:
    environ = dict(os.environ)
    environ = huge_pages.environment(environ) or environ
    return rounds.Worker(__spec__.name, name, environ)

  _, times = rounds.compare(VARIANTS, start, options.rounds, options.steps)
  return {
    "milliseconds": {k: 1e3 * statistics.median(v) for k, v in times.items()},
    "ratios": rounds.ratios(RATIOS, times),
  }


def show(record: dict) -> None:
  """Prints a record as tables."""
  for size, row in record["operations"].items():
    print(f"\nGFLOP a sample, forward and backward, {size}")
    for name, value in row.items():
      print(
        f"{name:12}{value:>10.3f}   {value / row['release']:.3f} of release"
      )
  if "ratios" in record:
    print("\nmilliseconds of forward and backward at tiny, 32 examples")
    for name, value in record["milliseconds"].items():
      print(f"{name:12}{value:>10.1f}")
    rounds.show_ratios(record["ratios"])


if __name__ == "__main__":
  main()
