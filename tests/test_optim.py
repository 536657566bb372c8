"""Optimizers against NumPy, decay by path, schedules, non-finite gradients."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import toys
from vlp_jax import config as config_lib
from vlp_jax import optim, skips
from vlp_jax.errors import UserError

STEPS, WARMUP = 8, 3


def make_config(**optimizer):
  config = config_lib.default_config()
  config.optimizer.update(optimizer)
  return config


def make_muon(weight_decay):
  return make_config(
    name="muon",
    learning_rate=0.1,
    muon_learning_rate=0.3,
    weight_decay=weight_decay,
    grad_clip=0.0,
  )


def make_params(seed=0, depth=2):
  """One leaf of each kind that the models have."""
  shapes = {
    "layers": {
      "attention": {
        "qkv": {"kernel": (depth, 8, 3, 2, 4), "bias": (depth, 3, 2, 4)},
        "out": {"proj": {"kernel": (depth, 2, 4, 8), "bias": (depth, 8)}},
      },
      "cross": {
        "q": {"kernel": (depth, 8, 2, 4)},
        "kv": {"kernel": (depth, 6, 2, 2, 4)},
      },
      "mlp": {"up": {"kernel": (depth, 8, 16)}},
      "norm": {"scale": (depth, 8), "bias": (depth, 8)},
    },
    "pool": {"query": (5, 8), "out": {"kernel": (2, 4, 8)}},
    "patch": {"kernel": (2, 2, 3, 8)},
    "embedding": {"embedding": (9, 8)},
    "vocabulary": {"kernel": (8, 9)},
    "pos": (7, 8),
    "cls": (8,),
    "mask_token": (8,),
    "logit_scale": (),
  }
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


@functools.cache
def compiled(config_json):
  """One compilation a config, whatever number of tests use it."""
  config = config_lib.from_json(config_json)
  tx, _ = optim.make_optimizer(config, STEPS, WARMUP)

  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return toys.jit(tx.init), toys.jit(step, donate_argnums=1)


def run(config, gradients, params):
  """Applies gradients one after another, jitted and with donated state."""
  init, step = compiled(config_lib.to_json(config))
  state = init(params)
  for gradient in gradients:
    params, state = step(params, state, gradient)
  return params, state


def rate(index, peak, name="cosine", end=0.0):
  """The learning rate in plain Python."""
  if index < WARMUP:
    return peak * (index + 1) / WARMUP
  t = min((index - WARMUP) / (STEPS - WARMUP), 1)
  decay = {"cosine": 0.5 * (1 + np.cos(np.pi * t)), "linear": 1 - t}
  return peak * (end + (1 - end) * decay.get(name, 1.0))


DECAYED = {
  "layers/attention/qkv/kernel",
  "layers/attention/out/proj/kernel",
  "layers/cross/q/kernel",
  "layers/cross/kv/kernel",
  "layers/mlp/up/kernel",
  "pool/out/kernel",
  "patch/kernel",
  "embedding/embedding",
  "vocabulary/kernel",
}
TOKENS = {"pool/query", "pos", "cls", "mask_token"}


def by_name(tree):
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_schedules(name, end):
  config = make_config(learning_rate=0.3)
  config.schedule.name, config.schedule.end_factor = name, end
  _, schedule = optim.make_optimizer(config, STEPS, WARMUP)
  schedule = jax.jit(schedule)
  got = [float(schedule(i)) for i in range(STEPS + 3)]
  want = [rate(i, 0.3, name, end) for i in range(STEPS + 3)]
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_schedule_edges():
  config = make_config(learning_rate=1.0)
  _, schedule = optim.make_optimizer(config, 10, 0)
  assert float(schedule(0)) == 1.0  # no warm-up
  _, schedule = optim.make_optimizer(config, 4, 8)
  assert [float(schedule(i)) for i in range(4)] == [0.125, 0.25, 0.375, 0.5]


def test_the_stairs_of_albef():
  """30 epochs of 10,000 updates; 20 stairs of 100 in the warm-up."""
  config = make_config(learning_rate=1e-4)
  config.schedule.update(start_factor=0.1, end_factor=0.1, stairs=30)
  _, schedule = optim.make_optimizer(config, 300_000, 2000)
  values = {0: 1e-5, 99: 1e-5, 100: 1.45e-5, 1000: 5.5e-5, 1999: 9.55e-5}
  values |= {2000: 1e-4, 9_999: 1e-4, 10_000: 9.975e-5, 19_999: 9.975e-5}
  values |= {100_000: 7.75e-5, 200_000: 3.25e-5, 299_999: 1.025e-5}
  for index, value in values.items():
    np.testing.assert_allclose(schedule(index), value, rtol=1e-3)
  for epoch in range(1, 30):
    expected = 1e-5 + 4.5e-5 * (1 + np.cos(np.pi * epoch / 30))
    for index in (10_000 * epoch, 10_000 * (epoch + 1) - 1):
      np.testing.assert_allclose(schedule(index), expected, rtol=1e-5)


def test_a_warm_up_from_a_factor():
  config = make_config(learning_rate=1.0)
  config.schedule.start_factor = 0.2
  _, schedule = optim.make_optimizer(config, 8, 4)
  got = [float(schedule(i)) for i in range(5)]
  np.testing.assert_allclose(got, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


def test_decay_by_path():
  mask = by_name(optim.decay_mask(make_params()))
  assert {name for name, decayed in mask.items() if decayed} == DECAYED
  more = by_name(optim.decay_mask(make_params(), ("tokens",)))
  more = {name for name, decayed in more.items() if decayed}
  assert more == DECAYED | TOKENS
  mask = by_name(optim.decay_mask(make_params(), ("tokens", "temperature")))
  everything = {name for name, decayed in mask.items() if decayed}
  assert everything == DECAYED | TOKENS | {"logit_scale"}


def test_what_else_decays():
  """Without a gradient, decay is all that moves a parameter."""
  config = make_config(weight_decay=0.5, decay_also=("tokens", "temperature"))
  start = make_params()
  zeros = jax.tree.map(jnp.zeros_like, start)
  got, _ = run(config, [zeros], start)
  factor = 1 - 0.5 * rate(0, config.optimizer.learning_rate)
  for name, value in by_name(got).items():
    moved = name in DECAYED | TOKENS | {"logit_scale"}
    expected = by_name(start)[name] * (factor if moved else 1)
    np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
  with pytest.raises(UserError, match="decay_also has 'bias', but it may have"):
    optim.make_optimizer(make_config(decay_also=("bias",)), 4, 0)


def test_adamw_equals_numpy():
  config = make_config(
    learning_rate=0.1, b1=0.8, b2=0.9, weight_decay=0.2, grad_clip=0.0
  )
  gradients = [make_params(seed) for seed in range(1, 5)]
  got, _ = run(config, gradients, make_params())
  for name, p in by_name(make_params()).items():
    p, m, v = np.asarray(p, np.float64), 0, 0
    for i, gradient in enumerate(gradients):
      g = np.asarray(by_name(gradient)[name], np.float64)
      m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
      step = (
        m / (1 - 0.8 ** (i + 1)) / (np.sqrt(v / (1 - 0.9 ** (i + 1))) + 1e-8)
      )
      p = p - rate(i, 0.1) * (step + 0.2 * (name in DECAYED) * p)
    np.testing.assert_allclose(by_name(got)[name], p, rtol=1e-5, atol=1e-5)


def test_multipliers():
  """They are of learning rates: what an optimizer does is scaled, decay too."""
  factors = '{"pool": 3, "kernel": 0.5, "logit_scale": 0.1}'
  gradients, start = [make_params(1)], make_params()
  usual, _ = run(make_config(), gradients, start)
  scaled, _ = run(make_config(multipliers=factors), gradients, start)
  for name, value in by_name(scaled).items():
    factor = 3.0 if name.startswith("pool") else 1.0
    factor *= 0.5 if name.endswith("kernel") else 1.0
    factor *= 0.1 if name == "logit_scale" else 1.0
    before = np.asarray(by_name(start)[name], np.float64)
    change = factor * (np.asarray(by_name(usual)[name]) - before)
    np.testing.assert_allclose(value, before + change, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  "factors, says",
  [
    ('{"nothing": 2}', "'nothing', which is no part .* begin with .*cls"),
    ('{"cls": "fast"}', "the number of 'cls' is 'fast', but must be positive"),
    ("cls=2", "is not JSON .*it is like"),
  ],
)
def test_impossible_multipliers(factors, says):
  with pytest.raises(UserError, match=says):
    run(make_config(multipliers=factors), [make_params()], make_params())


def test_lion_equals_numpy():
  config = make_config(
    name="lion", learning_rate=0.1, b1=0.8, b2=0.9, weight_decay=0.2
  )
  config.optimizer.grad_clip = 0.0
  gradients = [make_params(seed) for seed in range(1, 5)]
  got, _ = run(config, gradients, make_params())
  for name, p in by_name(make_params()).items():
    p, m = np.asarray(p, np.float64), 0
    for i, gradient in enumerate(gradients):
      g = np.asarray(by_name(gradient)[name], np.float64)
      step = np.sign(0.8 * m + 0.2 * g)
      m = 0.9 * m + 0.1 * g
      p = p - rate(i, 0.1) * (step + 0.2 * (name in DECAYED) * p)
    np.testing.assert_allclose(by_name(got)[name], p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("b1, most", [(0.0, 0.999), (0.8, 0.5)])
def test_adafactor_equals_numpy(b1, most):
  config = make_config(
    **dict(name="adafactor", learning_rate=0.1, weight_decay=0.2),
    **dict(b1=b1, b2=most, grad_clip=0.0),
  )
  rng = np.random.default_rng(0)
  shape = (40, 48)  # both sides are long enough for factors
  values = [rng.normal(size=shape).astype(np.float32) for _ in range(4)]
  params, *gradients = [{"up": {"kernel": jnp.asarray(v)}} for v in values]
  got, state = run(config, gradients, params)
  p, rows, columns, m = values[0].astype(np.float64), 0, 0, 0
  for i, g in enumerate(values[1:]):
    g = g.astype(np.float64)
    b2 = min(1 - (i + 1) ** -0.8, most)  # 0, 0.43, 0.58
    rows = b2 * rows + (1 - b2) * (g**2 + 1e-30).mean(1)
    columns = b2 * columns + (1 - b2) * (g**2 + 1e-30).mean(0)
    step = g / np.sqrt(np.outer(rows, columns) / rows.mean())
    step = step / max(1, np.sqrt((step**2).mean()))
    m = b1 * m + (1 - b1) * step
    p = p - rate(i, 0.1) * (m + 0.2 * p)
  np.testing.assert_allclose(got["up"]["kernel"], p, rtol=1e-4, atol=1e-5)
  second_moment = max(x.size for x in jax.tree.leaves(state) if x.ndim == 1)
  assert second_moment == 48


def test_types_and_times_decay_in_the_reference_and_learn_at_its_rate():
  config = config_lib.load("configs/scl.py:reference")
  also = config.optimizer.decay_also
  params = {"vision": {"temporal": 0.0}, "fusion": {"types": 0.0}}
  params |= {"text": {"type": 0.0, "norm": {"bias": 0.0}}}
  found = optim.decay_mask(params, also)
  assert found["vision"]["temporal"] and found["fusion"]["types"]
  assert found["text"] == {"type": True, "norm": {"bias": False}}
  factors = json.loads(config.optimizer.multipliers)
  assert factors["fusion"] == 5 and factors["fusion"] * factors["types"] == 1


def test_adafactor_factors_no_layers():
  """A deep stack's biases are vectors still: a moment for each number."""
  kernel, bias = (40, 64, 48), (40, 3, 4, 48)
  params = {
    "layers": {"qkv": {"kernel": jnp.ones(kernel), "bias": jnp.ones(bias)}}
  }
  config = make_config(name="adafactor", b1=0.0)
  _, state = run(config, [params], params)
  shapes = {x.shape for x in jax.tree.leaves(state)}
  assert {(40, 64), (40, 48), bias} <= shapes  # rows, columns, all
  assert kernel not in shapes


def orthogonalized(g):
  """Newton-Schulz as published, on one matrix [in, out] (Jordan 2024)."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = g.T if g.shape[0] > g.shape[1] else g
  x = x / np.linalg.norm(x)
  for _ in range(5):
    s = x @ x.T
    x = a * x + (b * s + c * s @ s) @ x
  return x.T if g.shape[0] > g.shape[1] else x


def matrices(name, x):
  """Cuts a parameter into the matrices [in, out] that it is made of."""
  x = np.asarray(x, np.float64)
  if not name.startswith("layers/"):
    x = x[None]
  for layer in x:
    if "qkv" in name or "/kv/" in name:
      parts = [
        layer[:, i].reshape(len(layer), -1) for i in range(layer.shape[1])
      ]
    elif "/q/" in name:
      parts = [layer.reshape(len(layer), -1)]
    elif "up" in name:
      parts = [layer]
    else:  # out, patch
      parts = [layer.reshape(-1, layer.shape[-1])]
    yield from parts


def test_muon_equals_numpy():
  """The first update is that of the gradient, per layer and per q, k, v."""
  config = make_muon(weight_decay=0.0)
  params, gradient = make_params(), make_params(1)
  after, _ = run(config, [gradient], params)
  update = jax.tree.map(lambda a, b: a - b, params, after)
  update, gradient = by_name(update), by_name(gradient)
  rest = set(update) - DECAYED | {"vocabulary/kernel", "embedding/embedding"}
  for name in rest:  # AdamW: the first update is the gradient's sign
    want = rate(0, 0.1) * np.sign(gradient[name])
    np.testing.assert_allclose(update[name], want, rtol=1e-4, atol=1e-6)
  for name in set(update) - rest:
    pairs = zip(
      matrices(name, update[name]), matrices(name, gradient[name]), strict=True
    )
    for u, g in pairs:
      grow = np.sqrt(max(1, g.shape[1] / g.shape[0]))
      want = rate(0, 0.3) * grow * orthogonalized(g)
      np.testing.assert_allclose(u, want, rtol=2e-3, atol=2e-4, err_msg=name)
      singular = np.linalg.svd(u / (rate(0, 0.3) * grow), compute_uv=False)
      # Newton-Schulz lifts small singular values, it does not reach all.
      assert singular.max() < 1.3 and np.median(singular) > 0.6, name


def test_muon_decays_weights():
  off, on = (
    run(
      make_muon(decay),
      [make_params(1)],
      make_params(),
    )[0]
    for decay in (0.0, 0.5)
  )
  shrunk = jax.tree.map(lambda a, b: a - b, off, on)
  for name, p in by_name(make_params()).items():
    table = name in ("vocabulary/kernel", "embedding/embedding")
    peak = 0.1 if table else 0.3
    want = rate(0, peak) * 0.5 * (name in DECAYED) * np.asarray(p)
    np.testing.assert_allclose(by_name(shrunk)[name], want, atol=1e-6)


def test_a_stack_is_trained_like_its_layers():
  """Under Muon: the others but Adafactor see single numbers only."""
  config = make_muon(weight_decay=0.5)
  gradients = [make_params(seed) for seed in (1, 2)]
  stacked, _ = run(config, gradients, make_params())
  for i in range(2):
    layer = [
      {"layer": jax.tree.map(lambda x, i=i: x[i], tree["layers"])}
      for tree in (make_params(), *gradients)
    ]
    alone, _ = run(config, layer[1:], layer[0])
    for leaf, value in by_name(alone["layer"]).items():
      np.testing.assert_allclose(
        by_name(stacked["layers"])[leaf][i], value, rtol=1e-5, atol=1e-6
      )


def test_clipping():
  config = make_config(grad_clip=1e-3)
  _, state = run(config, [make_params(1)], make_params())
  mu = optax.tree.get(state, "mu")  # (1 - b1) * clipped gradient
  norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(mu)))
  np.testing.assert_allclose(norm, 0.1 * 1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_nonfinite_gradients_change_nothing(name):
  config = make_config(name=name)
  good = [make_params(seed) for seed in (1, 2)]
  poison = []
  for bad in (np.nan, np.inf, 1e30):
    tree = make_params(3)
    poison.append({**tree, "cls": tree["cls"].at[3].set(bad)})
  want, want_state = run(config, good, make_params())
  got, state = run(config, [good[0], *poison, good[1]], make_params())
  jax.tree.map(np.testing.assert_array_equal, got, want)
  jax.tree.map(np.testing.assert_array_equal, state.inner, want_state.inner)
  assert skips.skipped(state) == 3 and skips.last_finite(state)
  _, state = run(config, [poison[0]], make_params())
  assert skips.skipped(state) == 1 and not skips.last_finite(state)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_state_has_a_fixed_structure(name):
  """What jit, donation and a restored checkpoint rely on."""
  config = make_config(name=name, mu_dtype="bfloat16")
  tx, _ = optim.make_optimizer(config, STEPS, WARMUP)
  params = jax.eval_shape(make_params)
  before = jax.eval_shape(tx.init, params)
  _, after = jax.eval_shape(tx.update, params, before, params)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for old, new in zip(
    jax.tree.leaves(before), jax.tree.leaves(after), strict=True
  ):
    assert (old.shape, old.dtype) == (new.shape, new.dtype)
  assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))


@pytest.mark.parametrize(
  "field, says",
  [
    ("optimizer.name=adam", "the optimizers are adamw, adafactor, lion, muon"),
    ("optimizer.mu_dtype=fp8", "neither float32 nor bfloat16"),
    ("schedule.name=step", "the schedules are cosine, linear, constant"),
    ("optimizer.max_spike=0.5", "max_spike is 0.5, but must be over 1, or 0"),
  ],
)
def test_what_cannot_be_is_refused(field, says):
  config = config_lib.override(make_config(), [field])
  with pytest.raises(UserError, match=says):
    optim.make_optimizer(config, STEPS, WARMUP)
