"""What a run says of itself at start-up."""

import types

import jax
import numpy as np

from vlp_jax import config as config_lib
from vlp_jax import sharding, train, train_state
from vlp_jax.ops import attention


def test_attention_is_named_once_and_steps_are_traced_once(capsys):
  traced = []

  def step(state, batch):
    traced.append(batch["image"].shape)
    x = state["x"]
    for mask in (None, np.ones((1, 3, 3), bool)):
      x, _ = attention.attend(x, x, x, mask, kernel="auto")
    return {"x": x}, {}

  config = config_lib.load("configs/clip.py:debug")
  mesh = sharding.make_mesh((2, 1, 1), jax.devices()[:2])
  everywhere = jax.NamedSharding(mesh, jax.P())
  state = {"x": jax.device_put(np.ones((1, 3, 2, 4), np.float32), everywhere)}
  step = jax.jit(step, out_shardings=({"x": everywhere}, None))
  streams = [types.SimpleNamespace(config=config)]
  (compiling,) = train.begin_to_compile([step], state, streams, mesh)
  assert capsys.readouterr().out == "attention: xla (cpu)\n"
  spec = train_state.batch_spec(config)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in spec.items()}
  compiling.result()(state, sharding.put_batch(batch, mesh))
  assert traced == [spec["image"].shape]
