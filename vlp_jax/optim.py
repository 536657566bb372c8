"""Optimizers by name, and learning-rate schedules.

What happens to a parameter is decided by its path, not by its rank alone:
a scanned stack gives every leaf one more axis, so a stacked bias is a matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from vlp_jax import factors as factors_lib
from vlp_jax import skips
from vlp_jax.errors import UserError

Schedule = Callable[[Any], jax.Array]

# Matrices and token tables. Everything else (biases, norms, positions, class
# and mask tokens, queries, the temperature) is neither decayed nor, under
# Muon, made orthogonal.
_DECAYED = ("kernel", "embedding")
# What `optimizer.decay_also` adds, by the last component of a path.
_DECAY_ALSO = {
  "tokens": (
    *("pos", "cls_pos", "temporal", "cls", "mask_token", "query"),
    *("type", "types"),
  ),
  "temperature": ("value", "logit_scale"),
}
# No matrices, however many layers' are stacked: Adafactor does not factor them.
_VECTORS = ("bias", "scale")
# A component of a path that marks parameters stacked along their first axis.
_STACK = "layers"
# Matrices to or from the vocabulary are rows of a table rather than maps
# between features: Muon leaves them to AdamW (Jordan 2024).
_TABLE = "vocabulary"
# Of Muon's five iterations (Jordan 2024), one by one: as a loop they compile in
# a fraction of the time, and are as fast.
_ITERATIONS = ((3.4445, -4.7750, 2.0315),) * 5
# Of `optimizer.multipliers`, for messages.
_EXAMPLE = '{"temperature": 0.1, "matching": 5}'


def make_optimizer(
  config: ConfigDict, total_steps: int, warmup_steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
  """Builds clip -> optimizer -> schedule, skipping what would do harm.

  Args:
    config: reads `optimizer` and `schedule`.
    total_steps: updates of the whole run.
    warmup_steps: updates of the linear warm-up.

  Returns:
    The transformation, and the schedule: update index -> learning rate.
    Updates that were skipped do not count as an index.

  Raises:
    UserError: on an unknown optimizer, schedule or dtype.
  """
  c = config.optimizer
  if 0 < c.max_spike <= 1:
    raise UserError(
      f"config.optimizer.max_spike is {c.max_spike}, but must be over 1, or 0 "
      "to skip no update for its size"
    )
  if c.name not in _OPTIMIZERS:
    raise UserError(
      f"config.optimizer.name is {c.name!r}, but the optimizers are "
      f"{', '.join(_OPTIMIZERS)}"
    )
  if c.mu_dtype not in ("float32", "bfloat16"):
    raise UserError(
      f"config.optimizer.mu_dtype is {c.mu_dtype!r}, neither float32 nor "
      "bfloat16"
    )
  shape = _shape(config.schedule, total_steps, warmup_steps)
  for kind in c.decay_also:
    if kind not in _DECAY_ALSO:
      raise UserError(
        f"config.optimizer.decay_also has {kind!r}, but it may have "
        f"{', '.join(_DECAY_ALSO)}"
      )
  optimizer = _OPTIMIZERS[c.name](c, shape)
  if c.multipliers:
    factors = factors_lib.parse(
      "optimizer.multipliers", c.multipliers, _EXAMPLE
    )
    optimizer = optax.chain(optimizer, _multiply(factors))
  if c.grad_clip:
    clip = optax.clip_by_global_norm(c.grad_clip)
    optimizer = optax.chain(clip, optimizer)
  return skips.skip_nonfinite(optimizer, c.max_spike), _scaled(
    c.learning_rate, shape
  )


# --- Schedules --------------------------------------------------------------


def _shape(config: ConfigDict, total_steps: int, warmup_steps: int) -> Schedule:
  """Returns the learning rate over its peak, as a function of the index.

  The warm-up ends at the peak. It starts at `start_factor` or, where that is
  zero, one part of `warmup_steps` above it, so that no update is wasted. A run
  shorter than its warm-up ends in it.

  With `stairs`, as in ALBEF's release: the decay counts from the first update
  and has so many stairs, and the warm-up covers its beginning in
  `warmup_stairs`.
  """
  decays = {
    "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    "linear": lambda t: 1 - t,
    "constant": jnp.ones_like,
  }
  if config.name not in decays:
    raise UserError(
      f"config.schedule.name is {config.name!r}, but the schedules are "
      f"{', '.join(decays)}"
    )
  decay, end = decays[config.name], config.end_factor
  start, stairs = config.start_factor, config.stairs
  first = 0 if stairs else warmup_steps  # update that the decay counts from

  def shape(index):
    index = jnp.asarray(index, jnp.float32)
    progress = (index - first) / max(total_steps - first, 1)
    warming = index / max(warmup_steps, 1)
    if stairs:
      # In whole updates: a float's error must not cost a stair.
      progress = jnp.floor(index * stairs / max(total_steps, 1)) / stairs
      warming = jnp.floor(warming * config.warmup_stairs) / config.warmup_stairs
    decayed = end + (1 - end) * decay(jnp.clip(progress, 0, 1))
    warming = start + (1 - start) * warming
    if not start:
      warming = (index + 1) / max(warmup_steps, 1)
    return jnp.where(index < warmup_steps, warming, decayed)

  return shape


def _scaled(peak: float, shape: Schedule) -> Schedule:
  return lambda index: peak * shape(index)


# --- Optimizers -------------------------------------------------------------


def _decays(c: ConfigDict) -> Callable[[Any], Any]:
  return functools.partial(decay_mask, also=c.decay_also)


def _adamw(c: ConfigDict, shape: Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    _scaled(c.learning_rate, shape),
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    mu_dtype=c.mu_dtype,
    weight_decay=c.weight_decay,
    mask=_decays(c),
  )


def _lion(c: ConfigDict, shape: Schedule) -> optax.GradientTransformation:
  return optax.lion(
    _scaled(c.learning_rate, shape),
    b1=c.b1,
    b2=c.b2,
    mu_dtype=c.mu_dtype,
    weight_decay=c.weight_decay,
    mask=_decays(c),
  )


def _adafactor(c: ConfigDict, shape: Schedule) -> optax.GradientTransformation:
  """Adafactor at Adam's learning rates, as CoCa and scaled ViTs use it.

  Zhai et al. 2022, section 3.4: no scaling by the parameter's size, a first
  moment (here if b1 > 0), weight decay that is multiplied by the learning
  rate. `optax.adafactor` has neither the last nor, so, the same decay as the
  other optimizers. The second moment's decay is 1 - t^-0.8 (Shazeer & Stern
  2018), but at most b2; eps is not used. Heads are small: factors from size 32
  on.
  """

  def decay(step, exponent):
    return jnp.minimum(1 - (step + 1.0) ** -exponent, c.b2)

  def labels(params):
    return _map_with_names(
      lambda names, _: "vector" if names[-1] in _VECTORS else "matrix", params
    )

  second_moments = {
    "matrix": optax.scale_by_factored_rms(
      min_dim_size_to_factor=32, decay_rate_fn=decay
    ),
    "vector": optax.scale_by_factored_rms(factored=False, decay_rate_fn=decay),
  }
  momentum = optax.ema(c.b1, debias=False, accumulator_dtype=c.mu_dtype)
  return optax.chain(
    optax.partition(second_moments, labels),
    optax.clip_by_block_rms(1.0),
    momentum if c.b1 else optax.identity(),
    optax.add_decayed_weights(c.weight_decay, mask=_decays(c)),
    optax.scale_by_learning_rate(_scaled(c.learning_rate, shape)),
  )


def _muon(c: ConfigDict, shape: Schedule) -> optax.GradientTransformation:
  """Muon (Jordan 2024) for matrices between features, AdamW for the rest.

  `muon_learning_rate` is that of the matrices. b1, b2, eps are AdamW's.
  """
  matrices = contrib.muon(
    _scaled(c.muon_learning_rate, shape),
    ns_coeffs=_ITERATIONS,
    mu_dtype=c.mu_dtype,
    weight_decay=c.weight_decay,
    muon_weight_dimension_numbers=_all_dimension_numbers,
  )

  def labels(params):
    return _map_with_names(
      lambda names, leaf: "rest" if _axes(names, leaf) is None else "matrix",
      params,
    )

  return optax.partition({"matrix": matrices, "rest": _adamw(c, shape)}, labels)


_OPTIMIZERS = {
  "adamw": _adamw,
  "adafactor": _adafactor,
  "lion": _lion,
  "muon": _muon,
}


def _multiply(factors: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies updates, and so learning rates, by part of a path.

  Where several parts of a path are named, their factors are multiplied.
  """

  def update(updates, params):
    del params
    unknown = set(factors)

    def scale(names, leaf):
      unknown.difference_update(names)
      return leaf * math.prod(factors.get(name, 1) for name in names)

    scaled = _map_with_names(scale, updates)
    if unknown:
      raise UserError(
        f"config.optimizer.multipliers names {min(unknown)!r}, which is no "
        "part of a parameter's path; paths begin with "
        f"{', '.join(sorted(updates))}"
      )
    return scaled

  return optax.stateless(update)


# --- What happens to which parameter ----------------------------------------


def decay_mask(params: Any, also: Sequence[str] = ()) -> Any:
  """Returns a tree of bools: which parameters weight decay shrinks.

  Args:
    params: parameters.
    also: beside matrices and token tables: "tokens", which are positions in
      space and time, class and mask tokens, types and queries; "temperature".
  """
  names = {*_DECAYED, *(name for kind in also for name in _DECAY_ALSO[kind])}
  return _map_with_names(lambda path, _: path[-1] in names, params)


def _all_dimension_numbers(params: Any) -> Any:
  return _map_with_names(_axes, params)


def _axes(
  names: tuple[str, ...], leaf: Any
) -> contrib.MuonDimensionNumbers | None:
  """Says which axes of a parameter are a matrix's rows and columns.

  Axes that are neither are a batch of matrices: layers of a stack; query, key
  and value of one `qkv`.

  Args:
    names: the parameter's path.
    leaf: anything with `ndim`.

  Returns:
    Input and output axes, or None if the parameter is no map between features.
  """
  if names[-1] != "kernel" or _TABLE in names:
    return None
  first = int(_STACK in names)  # the stack's axis is not part of a matrix
  axes = tuple(range(first, leaf.ndim))
  if len(axes) == 2:  # [in, out]
    cut, outputs = 1, axes[1:]
  elif "patch" in names:  # [height, width, channels, out]
    cut, outputs = len(axes) - 1, axes[-1:]
  elif "qkv" in names or "kv" in names:  # [in, 3 or 2, heads, head]
    cut, outputs = 1, axes[2:]
  elif "out" in names and len(axes) == 3:  # [heads, head, out]
    cut, outputs = 2, axes[2:]
  elif len(axes) == 3:  # [in, heads, head]
    cut, outputs = 1, axes[1:]
  else:
    return None
  return contrib.MuonDimensionNumbers(axes[:cut], outputs)


def _map_with_names(function: Callable, tree: Any) -> Any:
  def call(path, leaf):
    return function(tuple(str(getattr(k, "key", k)) for k in path), leaf)

  return jax.tree_util.tree_map_with_path(call, tree)
