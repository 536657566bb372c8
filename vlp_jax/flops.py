"""Operations of matrix products, counted in what JAX traces.

A product of `[M, K]` and `[K, N]` is `2 M K N` operations: multiplications and
additions. All else is left out, as is usual for a model's operations (Chowdhery
et al. 2022, "PaLM", appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from vlp_jax.methods.base import Batch, Context, Method
from vlp_jax.ops import attention, rng


def count(function: Callable, *args: Any) -> int:
  """Counts the operations of a function's matrix products and convolutions.

  What is counted is what the function says, not what a compiler makes of it: a
  loop's body as often as it runs, of branches the dearest, what is recomputed
  (`jax.checkpoint`) once more, and what no result needs as well. Under
  `shard_map` it is the work of all devices.

  Args:
    function: to be traced; it is never run.
    *args: arrays or `ShapeDtypeStruct`s.

  Raises:
    ValueError: if a product is in a `while` loop, whose length nobody knows, or
      in a Pallas kernel.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


@attention.by_xla()
def model_flops(method: Method, batch: Batch) -> int:
  """Counts the model operations of a training step, of all devices.

  Those of the losses and their gradient, for the whole batch at once and
  without recomputation: neither `model.remat`, `model.attention` nor
  `accumulate` changes them. The optimizer's are left out.

  Args:
    method: the method.
    batch: arrays or `ShapeDtypeStruct`s of a global batch.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  params, state = jax.eval_shape(method.init, key, batch)

  def losses(params, teacher, state, batch, key):
    size = batch["image_id"].shape[0]
    batch = {**batch, "index": jnp.arange(size, dtype=jnp.int32)}
    step = jnp.int32(0)
    ctx = Context(step, rng.streams(key, step), teacher, state, True)
    out = method.forward(params, batch, ctx)
    coupled = method.couple(params, out.shared, batch, ctx)
    terms = {**out.terms, **coupled.terms}
    weights = method.term_weights(step)
    return sum(weights[name] * term.total for name, term in terms.items())

  args = params, params if method.uses_ema else None, state, batch, key
  forward = core.jaxpr_as_fun(_without_recomputation(losses, *args))

  def gradient(params, *rest):
    def loss(params):
      return forward(*jax.tree.leaves((params, *rest)))[0]

    return jax.value_and_grad(loss)(params)

  return count(gradient, *args)


def _without_recomputation(function: Callable, *args: Any) -> core.ClosedJaxpr:
  """Traces a function, and has `jax.checkpoint` in it keep everything."""
  save = jax.checkpoint_policies.everything_saveable

  def change(value):
    if type(value) is tuple:  # of branches
      return tuple(map(change, value))
    if isinstance(value, core.Jaxpr):  # jax 0.12: closed ones, too
      return value.replace(eqns=[change_one(eqn) for eqn in value.eqns])
    if isinstance(value, core.ClosedJaxpr):
      return value.replace(jaxpr=change(value.jaxpr))
    return value

  def change_one(eqn):
    params = {name: change(param) for name, param in eqn.params.items()}
    if "policy" in params and "prevent_cse" in params:  # jax.checkpoint
      params["policy"] = save
    return eqn.replace(params=params)

  return change(jax.make_jaxpr(function)(*args))


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(map(_count_one, jaxpr.eqns))


def _count_one(eqn: core.JaxprEqn) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return _product(eqn)
  if name == "conv_general_dilated":
    return _convolution(eqn)
  inner = [_count(jaxpr) for jaxpr in _jaxprs(list(params.values()))]
  if name == "cond":
    return max(inner)
  if name in ("while", "pallas_call") and any(inner):
    raise ValueError(f"products in a `{name}` cannot be counted")
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "shard_map":
    mesh, axes = params["mesh"], params["newly_manual_axes"]
    return math.prod(mesh.shape[axis] for axis in axes) * sum(inner)
  return sum(inner)


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
  """Yields the traced functions in an equation's parameters."""
  if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
    yield getattr(value, "jaxpr", value)
  elif type(value) in (tuple, list):
    for item in value:
      yield from _jaxprs(item)


def _product(eqn: core.JaxprEqn) -> int:
  left = eqn.invars[0].aval.shape
  (contracted, _), _ = eqn.params["dimension_numbers"]
  terms = math.prod(left[axis] for axis in contracted)
  return 2 * math.prod(eqn.outvars[0].aval.shape) * terms


def _convolution(eqn: core.JaxprEqn) -> int:
  """Counts without the products with padding and with a stride's zeros."""
  params = eqn.params
  numbers = params["dimension_numbers"]
  image, kernel, out = (
    [value.aval.shape[axis] for axis in axes]
    for value, axes in (
      (eqn.invars[0], numbers.lhs_spec),
      (eqn.invars[1], numbers.rhs_spec),
      (eqn.outvars[0], numbers.out_spec),
    )
  )
  # Batch, and channels of the result; then channels that a kernel reads.
  terms = out[0] * out[1] * kernel[1]
  for axis, (before, _) in enumerate(params["padding"]):
    starts = np.arange(out[2 + axis]) * params["window_strides"][axis] - before
    taps = np.arange(kernel[2 + axis]) * params["rhs_dilation"][axis]
    places = starts[:, None] + taps
    stretch = params["lhs_dilation"][axis]
    last = (image[2 + axis] - 1) * stretch
    real = (places >= 0) & (places <= last) & (places % stretch == 0)
    terms *= int(real.sum())
  return 2 * terms
