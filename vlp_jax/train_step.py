"""One update, for any method, with exact accumulation.

A batch of B examples goes through `method.forward` in K chunks, and through
`method.couple` as a whole. With K > 1 this takes three steps, so that only
one chunk's activations exist at a time and the gradient is still that of the
whole batch (Gao et al. 2021, "Scaling deep contrastive learning batch size
under memory limited setup"):

1. Run all chunks without gradients; keep what `couple` needs of each example
   and the sums by which means are divided. What neither depends on, such as
   captions' logits, is left out by XLA.
2. Differentiate `couple` on the whole batch, with respect to the parameters
   and to what it read of each example.
3. Run each chunk again, whole, and pull the latter gradient back through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from vlp_jax import sharding, skips
from vlp_jax.methods.base import Batch, Context, Coupled, Mean, Method, Output
from vlp_jax.ops import layout, rng
from vlp_jax.ops.rows import merge, split
from vlp_jax.train_state import TrainState

Metrics = dict[str, jax.Array]

# Otherwise, on CPUs, XLA takes half of AVX-512's vectors, for those whose clock
# slows down with whole ones, and keeps many results at once, to have operations
# beside each other that have threads for all cores each.
_CPU_OPTIONS = {
  "xla_cpu_prefer_vector_width": 512,
  "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


def make_train_step(
  method: Method,
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int,
  mesh: Mesh,
  ema_decay: float,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns `step(state, batch) -> (state, metrics)`, to be jitted.

  Args:
    method: the method.
    optimizer: of `optim.make_optimizer`; it leaves parameters alone where a
      gradient is not finite.
    accumulate: number of chunks K.
    mesh: the mesh that batches are sharded over.
    ema_decay: of `ema_params`.

  The metrics are float32 scalars: `loss`, each term, what the method reports,
  `grad_norm` (before clipping), and `skipped`, the number of updates so far
  that were left out; see `skips.skip_nonfinite`.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    size = batch["image_id"].shape[0]
    batch = {**batch, "index": jnp.arange(size, dtype=jnp.int32)}
    ctx = Context(
      step=state.step,
      rngs=rng.streams(state.key, state.step),
      ema_params=state.ema_params,
      method_state=state.method_state,
      train=True,
      sharding=NamedSharding(mesh, sharding.BATCH),
    )
    weights = method.term_weights(state.step)
    args = method, state.params, batch, ctx, weights
    with layout.batch(ctx.sharding):
      if accumulate == 1:
        grads, means, method_state = _plain(*args)
      else:
        grads, means, method_state = _accumulated(*args, accumulate)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = method.project(optax.apply_updates(state.params, updates))
    finite = skips.last_finite(opt_state)

    def accept(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    ema_params = state.ema_params
    if ema_params is not None:
      average = optax.incremental_update(params, ema_params, 1 - ema_decay)
      ema_params = accept(average, ema_params)
    values = {name: mean.total / mean.weight for name, mean in means.items()}
    metrics = {
      "loss": sum(w * values[name] for name, w in weights.items()),
      **values,
      "grad_norm": optax.tree.norm(grads),
      "skipped": skips.skipped(opt_state).astype(jnp.float32),
    }
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      ema_params=ema_params,
      method_state=accept(method_state, state.method_state),
    )
    return state, metrics

  return sharding.on_mesh(step, mesh)


def jit_step(
  config: Any,
  method: Method,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the step of a run, jitted; it donates the state.

  Args:
    config: of the run: `accumulate`, `ema` and `cpu_optimization_level`.
    method: the method.
    optimizer: of `optim.make_optimizer`.
    mesh: the mesh.
    shardings: of the state.
  """
  step = make_train_step(
    method,
    optimizer,
    accumulate=config.accumulate,
    mesh=mesh,
    ema_decay=config.ema.decay,
  )
  options = {
    **_CPU_OPTIONS,
    "xla_backend_optimization_level": config.cpu_optimization_level,
  }
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(shardings, None),
    compiler_options=options if on_cpu else None,
  )


def _total(
  terms: dict[str, Mean], divisors: dict[str, Any], weights: dict[str, Any]
) -> jax.Array:
  """Sum of weight * total / divisor over the given terms."""
  parts = [weights[k] * m.total / divisors[k] for k, m in terms.items()]
  return sum(parts, jnp.float32(0))


def _sizes(terms: dict[str, Mean]) -> dict[str, jax.Array]:
  return {name: mean.weight for name, mean in terms.items()}


def _divisors(sizes: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What totals are divided by: sums of weights, at least a tiny one."""
  return {
    name: jax.lax.stop_gradient(jnp.maximum(size, 1e-6))
    for name, size in sizes.items()
  }


def _plain(method, params, batch, ctx, weights):
  """Gradient, means and new method state of a batch in one piece."""

  def loss(params):
    out = method.forward(params, batch, ctx)
    coupled = method.couple(params, out.shared, batch, ctx)
    terms = {**out.terms, **coupled.terms}
    means = {**terms, **out.report, **coupled.report}
    total = _total(terms, _divisors(_sizes(terms)), weights)
    return total, (_settle(means), coupled.method_state)

  (_, (means, state)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return grads, means, state


def _settle(means: dict[str, Mean]) -> dict[str, Mean]:
  """Makes means safe to divide: nothing to average is 0 / tiny."""
  divisors = _divisors(_sizes(means))
  return {k: Mean(m.total, divisors[k]) for k, m in means.items()}


def _accumulated(method, params, batch, ctx, weights, accumulate):
  """As `_plain`, in chunks; see the module's docstring."""
  chunks = jax.tree.map(lambda x: split(x, accumulate, ctx.sharding), batch)
  numbers = jnp.arange(accumulate)

  def forward(params, chunk, number) -> Output:
    # Dropout alone depends on the chunk, and is the same in both passes.
    dropout = jax.random.fold_in(ctx.rngs["dropout"], number)
    rngs = {**ctx.rngs, "dropout": dropout}
    return method.forward(params, chunk, ctx._replace(rngs=rngs))

  def prepare(_, item):
    out = forward(params, *item)
    return None, (out.shared, _sizes(out.terms))

  # Scans, not Python loops: XLA would merge the two passes of a loop, and
  # keep the activations of all chunks.
  _, (shared, sizes) = jax.lax.scan(prepare, None, (chunks, numbers))
  divisors = _divisors({k: jnp.sum(x) for k, x in sizes.items()})
  shared = jax.tree.map(lambda x: merge(x, ctx.sharding), shared)

  def couple(params, shared):
    coupled: Coupled = method.couple(params, shared, batch, ctx)
    divisors = _divisors(_sizes(coupled.terms))
    return _total(coupled.terms, divisors, weights), coupled

  (grads, grad_shared), coupled = jax.grad(couple, (0, 1), has_aux=True)(
    params, shared
  )
  grad_shared = jax.tree.map(
    lambda x: split(x, accumulate, ctx.sharding), grad_shared
  )

  def backward(grads, item):
    chunk, number, pull = item

    def loss(params):
      out = forward(params, chunk, number)
      pulled = jax.tree.map(lambda x, g: jnp.sum(x * g), out.shared, pull)
      total = _total(out.terms, divisors, weights)
      return total + sum(jax.tree.leaves(pulled)), {**out.terms, **out.report}

    grad, means = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(jnp.add, grads, grad), means

  grads, means = jax.lax.scan(backward, grads, (chunks, numbers, grad_shared))
  means = jax.tree.map(lambda x: jnp.sum(x, axis=0), means)
  means = {**means, **coupled.terms, **coupled.report}
  return grads, _settle(means), coupled.method_state
