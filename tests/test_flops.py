"""Operations: against hand counts, and against XLA's own."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests import toys
from vlp_jax import flops, sharding, skips, train_state, train_step
from vlp_jax.models.transformer import Transformer
from vlp_jax.ops import attention, platforms


def _array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _xla(function, *args) -> float:
  """What XLA counts: elementwise operations as well, a loop's body once."""
  return jax.jit(function).lower(*args).cost_analysis()["flops"]


def _sum(function):
  return lambda *args: jnp.sum(function(*args))


@pytest.mark.parametrize(
  "equation, shapes, want",
  [
    ("ij,jk->ik", [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
    ("bthd,bshd->bhts", [(2, 3, 4, 5), (2, 6, 4, 5)], 2 * 2 * 3 * 6 * 4 * 5),
    ("i,i->", [(9,), (9,)], 2 * 9),
  ],
)
def test_a_product(equation, shapes, want):
  def product(a, b):
    return jnp.einsum(equation, a, b)

  arrays = [_array(*shape) for shape in shapes]
  assert flops.count(product, *arrays) == want
  # Backward, a product for either side.
  both = jax.value_and_grad(_sum(product), (0, 1))
  assert flops.count(both, *arrays) == 3 * want


@pytest.mark.parametrize(
  "options",
  [
    dict(window_strides=(4, 4), padding="VALID"),
    dict(window_strides=(1, 1), padding="SAME"),
    dict(window_strides=(2, 1), padding=((2, 0), (1, 3))),
    dict(window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 1)),
    dict(window_strides=(1, 1), padding=((3, 2), (2, 3)), lhs_dilation=(2, 3)),
    dict(window_strides=(2, 2), padding="SAME", feature_group_count=3),
  ],
)
def test_a_convolution_and_its_gradients_count_as_xla_does(options):
  image = _array(2, 6, 8, 12)
  groups = options.get("feature_group_count", 1)
  kernel = _array(4, 4, 6 // groups, 9)

  def convolve(image, kernel):
    numbers = ("NCHW", "HWIO", "NCHW")
    return jax.lax.conv_general_dilated(
      image, kernel, dimension_numbers=numbers, **options
    )

  def gradients(image, kernel, out):
    return jax.vjp(convolve, image, kernel)[1](out)

  out = jax.eval_shape(convolve, image, kernel)
  forward = flops.count(convolve, image, kernel)
  assert forward == _xla(convolve, image, kernel)
  # The forward pass, which nothing reads, and as much for either side.
  assert flops.count(gradients, image, kernel, out) == 3 * forward


def test_loops_branches_and_calls():
  square = _array(4, 4)
  one = 2 * 4**3

  @jax.custom_jvp
  def curve(x):
    return x @ x

  @jax.custom_vjp
  def rule(x):
    return x @ x

  curve.defjvp(lambda x, t: (curve(*x), t[0]))
  rule.defvjp(lambda x: (rule(x), None), lambda _, g: (g,))

  def loop(x):
    return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0]

  def branch(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, jnp.negative, x)

  def forever(x):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

  for function, want in (
    (curve, 1),
    (rule, 1),
    (loop, 5),
    (branch, 2),
    (jax.jit(loop), 5),
    (jax.checkpoint(loop), 5),
    (lambda x: jax.lax.map(lambda row: row @ x, x), 1),
    (jax.grad(_sum(lambda x: jnp.sin(x @ x))), 3),
    (jax.grad(_sum(jax.checkpoint(lambda x: jnp.sin(x @ x)))), 4),
  ):
    assert flops.count(function, square) == want * one
  with pytest.raises(ValueError, match="while"):
    flops.count(forever, square)


def test_the_work_of_all_devices_is_counted():
  mesh = sharding.make_mesh((4, 2, 1))
  mapped = jax.shard_map(
    lambda a, b: a @ b,
    mesh=mesh,
    in_specs=(P("data"), P()),
    out_specs=P("data"),
  )
  # Along `fsdp`, devices repeat each other's work.
  assert flops.count(mapped, _array(8, 6), _array(6, 3)) == 2 * 2 * 8 * 6 * 3


def _transformer_by_hand(batch, length, width, depth):
  """Queries, keys, values, the way out and an MLP of four widths; attention."""
  linear = 2 * length * (4 * width**2 + 2 * 4 * width**2)
  attention = 2 * 2 * length**2 * width
  return batch * depth * (linear + attention)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
  ("remat", "again"),
  [
    # Products with weights, in units of width by width, and those of attention.
    ("none", (0, 0)),
    ("dots", (0, 2)),
    ("full", (3 + 1 + 4, 2)),
  ],
)
def test_a_transformer(scan, remat, again):
  """No gradient needs the MLP's last product, so that is never made again."""
  batch, length, width, depth = 2, 5, 16, 3
  model = Transformer(width, depth, num_heads=2, scan=scan, remat=remat)
  x = _array(batch, length, width)
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  want = _transformer_by_hand(batch, length, width, depth)
  assert flops.count(model.apply, params, x) == want
  gradient = jax.grad(_sum(model.apply))
  squares, scores = again
  recomputed = 2 * length * (squares * width**2 + scores * length * width)
  got = flops.count(gradient, params, x)
  assert got == 3 * want + batch * depth * recomputed


def test_a_step_of_clip_by_hand():
  """With [CLS] beside nine patches of 8 x 8 x 3; texts of ten tokens."""
  items = (*toys.CLS, "model.vision.stem=linear")
  method, config = toys.method("clip", *items), toys.config("clip", *items)
  batch, width, embed = config.batch_size, toys.WIDTH, config.model.embed_dim
  patches = 2 * batch * toys.PATCHES * (3 * toys.PATCH**2) * width
  vision = _transformer_by_hand(batch, toys.PATCHES + 1, width, 1)
  text = _transformer_by_hand(batch, toys.LENGTH, width, 1)
  projections = 2 * (2 * batch * width * embed)
  similarity = 2 * (2 * batch**2 * embed)  # in rows of either side
  got = flops.model_flops(method, train_state.batch_spec(config))
  # Pixels have no gradient.
  assert got == 2 * patches + 3 * (vision + text + projections + similarity)


def test_model_operations_know_no_recomputation():
  spec = train_state.batch_spec(toys.config("sycoca"))
  counts = {
    flops.model_flops(toys.method("sycoca", *items), spec)
    for items in ((), ("model.remat=full", "model.scan=true"))
  }
  assert len(counts) == 1


@pytest.mark.parametrize("kernel, on", [("tpu", "tpu"), ("cudnn", "cuda")])
def test_model_operations_know_no_kernel(kernel, on):
  spec = train_state.batch_spec(toys.config("clip"))
  want = flops.model_flops(toys.method("clip"), spec)
  items = (f"model.attention={kernel}", "model.dtype=bfloat16")
  with platforms.compiling_for(on), attention.choices() as found:
    assert flops.model_flops(toys.method("clip", *items), spec) == want
  assert {choice.kernel for choice in found} == {"xla"}


def test_a_small_step_costs_what_xla_says():
  """Of an unrolled step; XLA counts what is done elementwise, too."""
  widths = (f"model.{tower}.width=128" for tower in ("vision", "text"))
  items = ("model.scan=false", *widths, *toys.CLS, "model.pooler.width=128")
  items += ("batch_size=32",)
  method, spec = (
    toys.method("clip", *items),
    train_state.batch_spec(toys.config("clip", *items)),
  )
  optimizer = skips.skip_nonfinite(optax.sgd(0.1))
  state = jax.eval_shape(
    lambda: train_state.create(method, optimizer, spec, seed=0, use_ema=False)
  )
  step = train_step.make_train_step(
    method,
    optimizer,
    accumulate=1,
    mesh=sharding.make_mesh((1, 1, 1), jax.devices()[:1]),
    ema_decay=0.0,
  )
  ours, xla = flops.model_flops(method, spec), _xla(step, state, spec)
  assert ours == flops.count(step, state, spec)  # SGD has no products
  assert 0.96 * xla < ours < xla
