"""One update: against plain gradients, on any mesh, in any number of chunks."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import toys
from vlp_jax import hlo, sharding, skips, train_state, train_step
from vlp_jax.methods.base import Coupled, Mean, Output
from vlp_jax.ops import rng
from vlp_jax.ops import rows as rows_lib

ONE = (1, 1, 1)
SIZE = 64  # divides into 8 chunks on 8 devices


def _mesh(shape=ONE):
  devices = jax.devices()[: np.prod(shape)]
  return sharding.make_mesh(shape, devices)


def _batch(size=SIZE, seed=0):
  batch = toys.batch(size, seed)
  del batch["index"]  # the step numbers the examples
  return batch


def _start(optimizer, params, ema_params=None, method_state=None):
  return train_state.TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    ema_params=ema_params,
    method_state=method_state or {},
    key=jax.random.key(0, impl="threefry2x32"),
  )


def test_steps_on_cpus_take_whole_vectors_and_little_memory():
  mesh = _mesh()
  config = toys.config("clip")
  method = toys.method("clip")
  optimizer = skips.skip_nonfinite(optax.sgd(0.1))
  state = _start(optimizer, toys.params("clip"))
  shardings = sharding.shardings_for(state, mesh)
  batch = sharding.put_batch(_batch(), mesh)

  step = train_step.jit_step(config, method, optimizer, mesh, shardings)
  compiled = step.lower(state, batch).compile()
  plain = jax.jit(step.__wrapped__, donate_argnums=0).lower(state, batch)
  usual = plain.compile()

  whole = b"xla_cpu_prefer_vector_width"  # among what it was compiled with
  assert whole in compiled.runtime_executable().serialize()
  assert whole not in usual.runtime_executable().serialize()
  memory, usually = compiled.memory_analysis(), usual.memory_analysis()
  assert memory.temp_size_in_bytes < usually.temp_size_in_bytes


@pytest.mark.parametrize("level", (1, 3))
def test_steps_on_cpus_are_optimized_as_the_config_says(level):
  config = toys.config("clip", f"cpu_optimization_level={level}")
  optimizer = skips.skip_nonfinite(optax.sgd(0.1))
  state = _start(optimizer, toys.params("clip"))
  mesh = _mesh()
  shardings = sharding.shardings_for(state, mesh)
  batch = sharding.put_batch(_batch(), mesh)
  step = train_step.jit_step(
    config, toys.method("clip"), optimizer, mesh, shardings
  )
  said = step.lower(state, batch).compile().runtime_executable().serialize()
  name = b"xla_backend_optimization_level"
  assert said.split(name)[1].startswith(b"\x12\x02\x18" + bytes([level]))


# --- Every method, every mesh, every number of chunks -----------------------

METHODS = {
  "clip": ("clip",),
  "coca": ("coca", "method.caption_chunk=4"),
  "sycoca": ("sycoca",),
  "sycoca_tokens_random": (
    "sycoca",
    "method.mask_stage=tokens",
    "method.score=random",
    "method.decoders=shared",
  ),
  "albef": ("albef",),
  # Groups that reach over devices.
  "albef_groups": ("albef", "method.match_group=32"),
  "simla": ("simla",),
  "scl": ("scl", "method.patch_weight=0.2", "method.token_weight=0.2"),
}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
CHUNKS = [1, 2, 4, 8]
# Compiling takes long. These are run by default, the other combinations by
# `pytest -m slow`.
QUICK = {
  ("clip", (1, 8, 1), 2),
  ("coca", (2, 2, 2), 1),
  ("coca", (8, 1, 1), 8),
  ("sycoca", (2, 2, 2), 8),
  ("albef_groups", (2, 2, 2), 1),
  ("scl", (2, 2, 2), 1),
}
CASES = [
  pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
  for case in itertools.product(METHODS, [ONE, *MESHES], CHUNKS)
  # Groups that share negatives are not cut: those of four by nothing, those of
  # 32 by no chunk, which takes some rows of each device.
  if case[1:] != (ONE, 1)
  and not (
    case[0] in ("albef", "simla", "scl") and np.prod(case[1][:2]) * case[2] > 16
  )
  and not (case[0] == "albef_groups" and case[2] > 1)
]


def _params(name, seed=0):
  """Drawn parameters, with which SCL tells examples apart.

  To [CLS] of its shallow towers all toys look alike (cosines of 0.995): what
  its contrast's gradients sum up cancels, on one device, too, and leaves
  rounding. With more attention to the others, cosines are 0.89 and 0.97, and
  these gradients twenty times as large.
  """
  params = toys.params(*METHODS[name], seed=seed)
  if name != "scl":
    return params

  def louder(path, leaf):
    names = {part.key for part in path}
    return 2 * leaf if {"self_attention", "kernel"} <= names else leaf

  towers = {tower: params[tower] for tower in ("vision", "text")}
  return params | jax.tree_util.tree_map_with_path(louder, towers)


def start_of(name, optimizer):
  """A state of the method with drawn parameters, averages and queues."""
  uses_ema = toys.method(*METHODS[name]).uses_ema
  return _start(
    optimizer,
    _params(name),
    _params(name, seed=1) if uses_ema else None,
    toys.method_state(*METHODS[name]),
  )


def sent_pixels(text, shape):
  """Lines of a compiled program in which devices send each other pictures."""
  picture = ",".join(map(str, shape[1:])) + "]"
  words = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
  return [
    line
    for line in text.splitlines()
    if any(f" {word}" in line for word in words)
    and ("u8[" in line or picture in line)
  ]


def test_pictures_that_are_sent_would_be_found():
  mesh = _mesh((8, 1, 1))
  image = sharding.put_batch(_batch(), mesh)["image"]
  everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
  text = everywhere.lower(image).compile().as_text()
  assert sent_pixels(text, image.shape)


@functools.cache
def _losses_and_gradients(name, mesh_shape, accumulate):
  """What the step finds, from the same parameters and the same batch."""
  method, mesh = toys.method(*METHODS[name]), _mesh(mesh_shape)
  optimizer = skips.skip_nonfinite(toys.record_gradients())
  state = start_of(name, optimizer)
  shardings = sharding.shardings_for(state, mesh)
  step = toys.jit(
    train_step.make_train_step(
      method, optimizer, accumulate=accumulate, mesh=mesh, ema_decay=0.0
    ),
    out_shardings=(shardings, None),
  )
  batch = sharding.put_batch(_batch(), mesh)
  args = jax.device_put(state, shardings), batch
  compiled = step.lower(*args).compile()
  assert not sent_pixels(compiled.as_text(), batch["image"].shape)
  state, metrics = compiled(*args)
  split = {
    axis
    for leaf in jax.tree.leaves(state.opt_state.inner)
    for axes in leaf.sharding.spec
    for axis in (axes if isinstance(axes, tuple) else (axes,))
    if axis and mesh.shape[axis] > 1
  }
  return jax.device_get(metrics), jax.device_get(state.opt_state.inner), split


@pytest.mark.parametrize("name, mesh, accumulate", CASES, ids=str)
def test_meshes_and_chunks(name, mesh, accumulate, monkeypatch):
  # Toys are small: split what would be copied to every device.
  monkeypatch.setattr(sharding, "MIN_SIZE", 64)
  expected, expected_gradient, _ = _losses_and_gradients(name, ONE, 1)
  metrics, gradient, split = _losses_and_gradients(name, mesh, accumulate)
  sizes = dict(zip(sharding.AXES, mesh, strict=True))
  assert split == {a for a in ("fsdp", "tensor") if sizes[a] > 1}
  assert metrics.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
  toys.assert_gradients_close(gradient, expected_gradient)


def _compiled(name, batch_size, accumulate):
  """A step on one device."""
  optimizer = skips.skip_nonfinite(optax.sgd(0.1))
  size = f"batch_size={batch_size}"
  spec = train_state.batch_spec(toys.config(*METHODS[name], size))
  step = train_step.make_train_step(
    toys.method(*METHODS[name]),
    optimizer,
    accumulate=accumulate,
    mesh=_mesh(),
    ema_decay=0.0,
  )
  jitted = toys.jit(step, donate_argnums=0)
  return jitted.lower(start_of(name, optimizer), spec).compile()


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name == "clip" else pytest.mark.slow)
    for name in METHODS
  ],
)
def test_chunks_need_less_memory(name):
  """Where activations dominate: an eighth of them, and what chunks cost."""
  whole, chunks = (
    _compiled(name, 512, accumulate).memory_analysis().temp_size_in_bytes
    for accumulate in (1, 8)
  )
  assert chunks <= whole / 4


@pytest.mark.parametrize(
  "name",
  [
    *("coca", "sycoca"),
    *(
      pytest.param(name, marks=pytest.mark.slow) for name in ("albef", "simla")
    ),
  ],
)
def test_the_first_pass_makes_only_what_is_contrasted(name):
  """Whole it is a third of a step, or more: no captions, no fusion."""
  whole, chunks = (
    sum(
      one.times * one.operations
      for one in hlo.Module(_compiled(name, 16, accumulate).as_text()).work()
    )
    for accumulate in (1, 2)
  )
  assert 1.1 < chunks / whole < 1.25


# --- Chunks -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [ONE, (2, 2, 2), (1, 8, 1)])
def test_split_and_merge(shape):
  mesh = _mesh(shape)
  devices, chunks = shape[0] * shape[1], 4
  x = np.arange(SIZE * 3).reshape(SIZE, 3)
  put = sharding.put_batch({"x": x}, mesh)["x"]
  rows_of = NamedSharding(mesh, sharding.BATCH)
  split = jax.jit(lambda x: rows_lib.split(x, chunks, rows_of))
  pieces = split(put)
  assert pieces.shape == (chunks, SIZE // chunks, 3)
  spec = NamedSharding(mesh, P(None, ("data", "fsdp")))
  assert pieces.sharding.is_equivalent_to(spec, ndim=3)
  # Of every device's block of rows, each chunk has the next part.
  rows = np.arange(SIZE).reshape(devices, chunks, -1).swapaxes(0, 1)
  np.testing.assert_array_equal(pieces, x[rows.reshape(chunks, -1)])
  merge = jax.jit(lambda x: rows_lib.merge(x, rows_of))
  np.testing.assert_array_equal(merge(pieces), x)
  assert merge(pieces).sharding.is_equivalent_to(put.sharding, ndim=2)
  for function, argument in ((split, put), (merge, pieces)):
    text = function.lower(argument).compile().as_text()
    for word in (
      "all-gather",
      "all-to-all",
      "collective-permute",
      "all-reduce",
    ):
      assert word not in text


# --- What the step does beside: a method of a few lines ---------------------

QUEUE = 4


@dataclasses.dataclass(frozen=True)
class Toy:
  """Weighted tokens, pairs against a queue, a teacher, noise."""

  noise: float = 0.0

  def forward(self, params, batch, ctx):
    x = jnp.mean(batch["image"], axis=(1, 2)) / 255
    # Picture 99 breaks the loss.
    x = jnp.where(batch["image_id"][:, None] == 99, jnp.inf, x)
    embedding = jnp.tanh(x @ params["w"])
    values = embedding[:, :1] * batch["text"]
    weights = jnp.arange(values.shape[1]) < batch["text_len"][:, None]
    noise = jax.random.normal(ctx.rngs["dropout"], (len(x),))
    terms = {
      "token": Mean.of(values, weights.astype(jnp.float32)),
      "noise": Mean.of(self.noise * noise * params["b"]),
    }
    if ctx.ema_params is not None:
      teacher = jnp.tanh(x @ ctx.ema_params["w"])
      terms["teacher"] = Mean.of(embedding * teacher)
    report = {"drawn": Mean.of(noise)}
    return Output({"embedding": embedding}, terms, report)

  def couple(self, params, shared, batch, ctx):
    embedding, state = shared["embedding"], ctx.method_state
    keys = jnp.concatenate([embedding, state["queue"]])
    loss = jax.nn.logsumexp(params["b"] * embedding @ keys.T, axis=1)
    new = {"queue": jax.lax.stop_gradient(embedding[:QUEUE])}
    report = {"order": Mean.of(batch["index"] * embedding[:, 0])}
    return Coupled({"pair": Mean.of(loss)}, report, new)

  def term_weights(self, step):
    weights = {"token": 0.1 / (1.0 + step), "pair": 2.0, "noise": 1.0}
    return weights | {"teacher": 0.5}

  def project(self, params):
    return params | {"b": jnp.clip(params["b"], 1.4, 2.0)}


PARAMS = {
  "w": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
  "b": np.float32(1.5),
}
DECAY = 0.75


@functools.cache
def _toy(accumulate=1, noise=0.0):
  optimizer = skips.skip_nonfinite(
    optax.chain(toys.record_gradients(), optax.sgd(0.1))
  )
  step = train_step.make_train_step(
    Toy(noise), optimizer, accumulate=accumulate, mesh=_mesh(), ema_decay=DECAY
  )
  ema_params = jax.tree.map(lambda p: p * np.float32(0.5), PARAMS)
  queue = {"queue": np.ones((QUEUE, 5), np.float32)}
  return _start(optimizer, PARAMS, ema_params, queue), toys.jit(step)


def _toy_loss(params, ema_params, queue, batch, step):
  """The Toy's loss in one piece, with a library for derivatives only."""
  x = jnp.mean(batch["image"], axis=(1, 2)) / 255
  embedding = jnp.tanh(x @ params["w"])
  real = np.arange(toys.LENGTH) < batch["text_len"][:, None]
  token = jnp.sum(embedding[:, :1] * batch["text"] * real) / real.sum()
  keys = jnp.concatenate([embedding, queue])
  pair = jnp.mean(
    jnp.log(jnp.exp(params["b"] * embedding @ keys.T).sum(axis=1))
  )
  teacher = jnp.mean(embedding * jnp.tanh(x @ ema_params["w"]))
  total = 0.1 / (1 + step) * token + 2 * pair + 0.5 * teacher
  return total, (dict(token=token, pair=pair, teacher=teacher), embedding)


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_updates_by_hand(accumulate):
  """Three updates: gradient, clamp, average, queue, schedule of weights."""
  state, step = _toy(accumulate)
  params, ema, queue = state.params, state.ema_params, np.ones((QUEUE, 5))
  for i in range(3):
    batch = _batch(seed=i)
    (loss, (terms, embedding)), gradient = jax.value_and_grad(
      _toy_loss, has_aux=True
    )(params, ema, queue, batch, i)
    state, metrics = step(state, batch)
    toys.assert_gradients_close(state.opt_state.inner[0], gradient)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    params["b"] = np.clip(params["b"], 1.4, 2)
    ema = jax.tree.map(lambda e, p: DECAY * e + (1 - DECAY) * p, ema, params)
    queue = embedding[:QUEUE]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(metrics["loss"], loss)
    for name, value in terms.items():
      close(metrics[name], value)
    close(metrics["order"], np.mean(np.arange(SIZE) * embedding[:, 0]))
    squares = [np.sum(g * g) for g in jax.tree.leaves(gradient)]
    close(metrics["grad_norm"], np.sqrt(sum(squares)))
    jax.tree.map(close, state.params, params)
    jax.tree.map(close, state.ema_params, ema)
    close(state.method_state["queue"], queue)
    assert metrics["skipped"] == 0
    assert params["b"] == np.float32(1.4)  # it was projected
    assert all(v.dtype == np.float32 for v in metrics.values())
  assert state.step == 3
  assert state.key == jax.random.key(0, impl="threefry2x32")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_are_not_finite_change_nothing(accumulate):
  state, step = _toy(accumulate)
  state, _ = step(state, _batch())
  bad = _batch(seed=1)
  bad["image_id"][5] = 99
  for i in (1, 2):
    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == i
    assert after.step == 1 + i
    for field in ("params", "ema_params", "method_state"):
      toys.assert_trees_equal(getattr(after, field), getattr(state, field))
    toys.assert_trees_equal(after.opt_state.inner, state.opt_state.inner)
    state = after
  after, metrics = step(state, _batch(seed=2))
  assert metrics["skipped"] == 2
  assert (after.params["w"] != state.params["w"]).any()
  assert (after.ema_params["w"] != state.ema_params["w"]).any()
  assert (after.method_state["queue"] != state.method_state["queue"]).any()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_is_the_same_in_both_passes(accumulate):
  """Each chunk has its noise, and its gradient is of that noise."""
  state, step = _toy(accumulate, noise=1.0)
  for i in range(2):
    old, (state, metrics) = state, step(state, _batch())
    key = rng.streams(old.key, np.int32(i))["dropout"]
    keys = [key]
    if accumulate > 1:
      keys = [jax.random.fold_in(key, chunk) for chunk in range(accumulate)]
    noise = [jax.random.normal(k, (SIZE // accumulate,)) for k in keys]
    np.testing.assert_allclose(metrics["drawn"], np.mean(noise), rtol=1e-4)
    queue = old.method_state["queue"]
    quiet = jax.grad(_toy_loss, has_aux=True)(
      old.params, old.ema_params, queue, _batch(), i
    )[0]["b"]
    gradient = state.opt_state.inner[0]["b"]
    np.testing.assert_allclose(
      gradient - quiet, np.mean(noise), rtol=1e-4, atol=1e-5
    )
    assert abs(np.mean(noise)) > 1e-3


def test_nothing_to_average_is_zero():
  state, step = _toy()
  batch = _batch()
  batch["text_len"][:] = 0
  state, metrics = step(state, batch)
  assert metrics["token"] == 0
  assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0


def test_without_an_average_there_is_none():
  optimizer = skips.skip_nonfinite(optax.sgd(0.1))
  step = train_step.make_train_step(
    _NoTeacher(), optimizer, accumulate=1, mesh=_mesh(), ema_decay=DECAY
  )
  queue = {"queue": np.ones((QUEUE, 5), np.float32)}
  start = _start(optimizer, PARAMS, method_state=queue)
  state, metrics = toys.jit(step)(start, _batch())
  assert state.ema_params is None
  assert "teacher" not in metrics


class _NoTeacher(Toy):
  def term_weights(self, step):
    return {"token": 0.1, "pair": 2.0, "noise": 1.0}
