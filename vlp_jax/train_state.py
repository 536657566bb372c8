"""All that a step needs in order to go on."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vlp_jax import hosts
from vlp_jax.methods.base import (
  Batch,
  Method,
  MethodState,
  Params,
  Pictures,
)


@flax.struct.dataclass
class TrainState:
  """The state of a run; no functions inside.

  Attributes:
    step: int32 scalar, finished updates.
    params: float32.
    opt_state: the optimizer's.
    ema_params: the moving average of `params`, or None.
    method_state: what a method owns: queues, pointers.
    key: the base PRNG key; never advanced.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  ema_params: Params | None
  method_state: MethodState
  key: jax.Array


def create(
  method: Method,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  *,
  seed: int | jax.Array,
  use_ema: bool,
) -> TrainState:
  """Makes the state of step 0.

  Call it under `jit` (or `eval_shape`): the average must not share buffers
  with the parameters, which the step donates.

  Args:
    method: the method.
    optimizer: the optimizer.
    batch: arrays or `ShapeDtypeStruct`s; only their shapes are used.
    seed: of the parameters and of everything that is drawn later.
    use_ema: whether to keep `ema_params`.
  """
  key = jax.random.key(seed, impl="threefry2x32")
  zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in batch.items()}
  params, method_state = method.init(key, zeros)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    ema_params=jax.tree.map(jnp.copy, params) if use_ema else None,
    method_state=method_state,
    key=key,
  )


def of_config(
  config: Any, method: Method, optimizer: optax.GradientTransformation
) -> TrainState:
  """Makes the state of step 0 of a run; see `create`."""
  return create(
    method,
    optimizer,
    batch_spec(config),
    seed=config.seed,
    use_ema=method.uses_ema or config.ema.decay > 0,
  )


def start(
  method: Method, state: TrainState, shardings: TrainState, pictures: Pictures
) -> TrainState:
  """Lets a method change the state of step 0; see `Method.start`.

  The average starts from the same parameters.

  Args:
    method: the method.
    state: of `create`.
    shardings: of the state.
    pictures: for `Method.start`.
  """
  params, method_state = method.start(
    state.params, state.method_state, pictures
  )
  if params is not state.params:
    params = hosts.put(params, shardings.params)
    state = state.replace(params=params)
    if state.ema_params is not None:
      average = jax.jit(
        lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings.ema_params
      )(params)
      state = state.replace(ema_params=average)
  if method_state is not state.method_state:
    method_state = hosts.put(method_state, shardings.method_state)
    state = state.replace(method_state=method_state)
  return state


def abstract_params(method: Method, config: Any) -> Params:
  """Shapes and dtypes of a method's parameters, without making them."""
  return jax.eval_shape(method.init, jax.random.key(0), batch_spec(config))[0]


def batch_spec(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a global training batch."""
  b, size = config.batch_size, config.data.image_size
  frames = (config.data.num_frames,) if config.data.num_frames else ()
  length = config.tokenizer.max_len

  def spec(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)

  return {
    "image": spec(b, *frames, size, size, 3, dtype=jnp.uint8),
    "text": spec(b, length),
    "text_len": spec(b),
    "image_id": spec(b),
  }
