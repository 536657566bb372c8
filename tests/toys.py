"""What tests are run on: the real configs at toy size, and random inputs.

Parameters are drawn here rather than initialised: no bias is zero and no
scale is one, so that a term which is left out shows.
"""

import functools
import inspect
import os
import pathlib
import random
import socket

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlp_jax import config as config_lib
from vlp_jax import train_state
from vlp_jax.methods import base
from vlp_jax.methods.base import Context
from vlp_jax.ops import rng

IMAGE, PATCH, WIDTH, VOCAB, LENGTH = 24, 8, 16, 40, 10
PATCHES = (IMAGE // PATCH) ** 2
BOS, EOS = 2, 3

_SMALL = (
  f"data.image_size={IMAGE}",
  "batch_size=8",
  f"tokenizer.vocab_size={VOCAB}",
  f"tokenizer.max_len={LENGTH}",
  "model.embed_dim=12",
  f"model.vision.width={WIDTH}",
  "model.vision.depth=1",
)
_TOWERS = (
  f"model.text.width={WIDTH}",
  f"model.text.max_len={LENGTH}",
  f"model.pooler.width={WIDTH}",
)
_FUSION = (
  f"model.stream.width={WIDTH}",
  "model.stream.depth=2",
  "model.stream.max_len=12",
  "method.match_group=4",
  "method.queue_size=12",
  "method.alpha_ramp_steps=4",
  "method.grounding_layer=0",
)
_METHODS = {
  "clip": _TOWERS,
  "coca": (*_TOWERS, f"model.decoder.width={WIDTH}"),
  "sycoca": (
    *_TOWERS,
    f"model.decoder.width={WIDTH}",
    f"model.image_decoder.width={WIDTH}",
  ),
  "albef": _FUSION,
  "simla": (
    *_FUSION,
    "method.visual_vocab_size=8",
    "method.mask_patches=4",
    "method.mask_block=1",
  ),
}
_METHODS["scl"] = (
  f"model.text.width={WIDTH}",
  "model.text.depth=1",
  f"model.text.max_len={LENGTH}",
  "model.fusion.width=20",
  "model.fusion.depth=2",
  "model.vision.frames=4",
  "method.match_group=4",
)
# Poolers that read [CLS] need one.
CLS = ("model.pooler.kind=cls", "model.vision.cls_token=true")


def config(name: str, *overrides: str):
  """The `tiny` size of `configs/<name>.py`, made smaller still."""
  items = (*_SMALL, *_METHODS[name], *overrides)
  return config_lib.load(f"configs/{name}.py", items)


@functools.cache
def method(name: str, *overrides: str):
  """The method of `config(name, *overrides)`."""
  return base.get(name, config(name, *overrides))


def batch(size: int = 4, seed: int = 0, image_size: int = IMAGE) -> dict:
  """A batch with captions of all lengths; the last two share a picture's id."""
  draw = np.random.default_rng(seed)
  shape = (size, image_size, image_size, 3)
  text_len = draw.integers(3, LENGTH + 1, size).astype(np.int32)
  text_len[:2] = LENGTH, 3
  text = draw.integers(4, VOCAB, (size, LENGTH)).astype(np.int32)
  text[:, 0] = BOS
  text[np.arange(size), text_len - 1] = EOS
  text[np.arange(LENGTH) >= text_len[:, None]] = 0
  image_id = np.arange(size, dtype=np.int32)
  image_id[-1] = image_id[-2]
  return dict(
    image=draw.integers(0, 256, shape, dtype=np.uint8),
    text=text,
    text_len=text_len,
    image_id=image_id,
    index=np.arange(size, dtype=np.int32),
  )


def random_like(shapes, seed: int = 0):
  """Draws parameters for a tree of shapes, of the size that they have."""
  draw = np.random.default_rng(seed)

  def fill(path, leaf):
    name = path[-1].key
    values = 0.2 * draw.standard_normal(leaf.shape, np.float32)
    if name == "scale":
      return 1 + values
    if name == "value":  # a temperature
      return np.float32(0.2)
    return np.log(np.float32(5)) if name == "logit_scale" else values

  return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def _shapes(name: str, *overrides: str):
  spec = train_state.batch_spec(config(name, *overrides))
  init = method(name, *overrides).init
  return jax.eval_shape(init, jax.random.key(0), spec)


def shapes(name: str, *overrides: str):
  """Shapes of a method's parameters."""
  return _shapes(name, *overrides)[0]


def method_state(name: str, *overrides: str, seed: int = 0):
  """A drawn state of the method: queues, a visual tokenizer."""
  shapes = _shapes(name, *overrides)[1]
  draw = np.random.default_rng(seed)

  def fill(path, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.full(leaf.shape, -1 if leaf.ndim else 0, leaf.dtype)
    values = draw.standard_normal(leaf.shape, np.float32)
    if path[-1].key.endswith("queue"):
      values /= np.linalg.norm(values, axis=1, keepdims=True)
    return jnp.asarray(values)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def params(name: str, *overrides: str, seed: int = 0):
  """Drawn parameters of `method(name, *overrides)`."""
  return random_like(shapes(name, *overrides), seed)


def context(
  step: int = 0, seed: int = 0, method_state=None, ema_params=None
) -> Context:
  """What the step would hand a method."""
  key = jax.random.key(seed, impl="threefry2x32")
  step = jnp.int32(step)
  streams = rng.streams(key, step)
  return Context(step, streams, ema_params, method_state or {}, True)


@functools.cache
def compiler_options() -> dict:
  """XLA's options that compile fastest; none where they are unknown."""
  options = dict(
    xla_backend_optimization_level=0,
    xla_llvm_disable_expensive_passes=True,
    xla_cpu_use_fusion_emitters=False,
  )
  try:
    jax.jit(lambda: jnp.int32(0), compiler_options=options)()
  except Exception:  # another XLA, which knows other options
    return {}
  return options


def jit(function, **kwargs):
  """`jax.jit` that compiles fast and does not care how fast the result is.

  What is a method of `method` is compiled once, whoever asks for it.
  """
  if inspect.ismethod(function):
    return _jit(function, **kwargs)
  return jax.jit(function, compiler_options=compiler_options(), **kwargs)


@functools.cache
def _jit(function, **kwargs):
  return jax.jit(function, compiler_options=compiler_options(), **kwargs)


def module_call(name: str, overrides: tuple[str, ...], function: str):
  """One compiled method of the linen module; further arguments are arrays."""
  return apply(method(name, *overrides), function)


@functools.cache
def apply(built, function: str):
  """As `module_call`, of a method that was built already."""
  return jit(lambda params, *args: built.apply(params, function, *args))


@functools.cache
def losses(name: str, *overrides: str):
  """Compiled `(params, batch, context) -> (total, (terms, report))`."""
  return jit(functools.partial(_losses, method(name, *overrides)))


@functools.cache
def gradients(name: str, *overrides: str):
  """Compiled gradient of the total loss, and the terms."""
  built = functools.partial(_losses, method(name, *overrides))
  return jit(jax.grad(built, has_aux=True))


def _losses(method, params, batch, ctx):
  ctx = ctx._replace(train=True)  # a Python bool, which jit would trace
  out = method.forward(params, batch, ctx)
  coupled = method.couple(params, out.shared, batch, ctx)
  terms = {**out.terms, **coupled.terms}
  values = {name: mean.total / mean.weight for name, mean in terms.items()}
  report = {**out.report, **coupled.report}
  report = {name: mean.total / mean.weight for name, mean in report.items()}
  weights = method.term_weights(ctx.step)
  total = sum(weight * values[name] for name, weight in weights.items())
  return total, (values, report)


def record_gradients() -> optax.GradientTransformation:
  """Changes nothing; its state is the last gradient."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, state, params=None: (gradients, gradients),
  )


def assert_trees_equal(actual, expected):
  """Bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_gradients_close(actual, expected, tolerance: float = 1e-5):
  """Each leaf within `tolerance` of the largest number in that leaf.

  A bias of attention keys shifts all scores of a row alike: its gradient is
  zero but for rounding, and is held against the whole gradient instead.
  """
  actual, expected = jax.device_get((actual, expected))
  largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))

  def check(path, got, want):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    scale = np.max(np.abs(want))
    if name.endswith("/k/bias"):
      assert scale < 1e-6 * largest, name
      scale = largest
    error = np.max(np.abs(got - want))
    assert error <= tolerance * scale, f"{name}: {error} of {scale}"

  jax.tree_util.tree_map_with_path(check, actual, expected)


_drawn = set()


def free_port() -> int:
  """A port that nobody listens to, nor will before it is used, in a while.

  No connection is given it: it is below those that the system gives out. And
  no other worker of pytest-xdist draws from the same.
  """
  file = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
  first = int(file.read_text().split()[0]) if file.exists() else 32768
  end = first if first > 12_000 else 32768  # few are below: as elsewhere
  worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
  workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
  ports = range(10_000 + worker, end, workers)
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  for port in random.SystemRandom().sample(ports, len(ports)):
    if port in _drawn:
      continue
    try:
      socket.create_server(
        ("", port), family=family, dualstack_ipv6=dual
      ).close()
    except OSError:
      continue
    _drawn.add(port)
    return port
  raise OSError("no port is free")
