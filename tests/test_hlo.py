"""What a compiled program does, counted beside counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import toys
from vlp_jax import flops, hlo, sharding

LAYERS, WIDTH, BATCH, TOKENS = 5, 32, 16, 6


def _loss(weights, x):
  """A loop over layers, whose insides are made again."""

  def layer(x, w):
    return jnp.tanh(x @ w), None

  x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
  return jnp.sum(x**2)


def _compiled(fsdp):
  mesh = sharding.make_mesh((8 // fsdp, fsdp, 1), jax.devices()[:8])
  weights = jax.ShapeDtypeStruct(
    (LAYERS, WIDTH, WIDTH),
    jnp.float32,
    sharding=NamedSharding(mesh, P(None, None, "fsdp")),
  )
  x = jax.ShapeDtypeStruct(
    (BATCH, TOKENS, WIDTH),
    jnp.float32,
    sharding=NamedSharding(mesh, sharding.BATCH),
  )
  compiled = jax.jit(jax.grad(_loss)).lower(weights, x)
  return compiled.compile(toys.compiler_options()), weights, x


def test_a_loop_counts_as_often_as_it_runs():
  compiled, *args = _compiled(1)
  work = list(hlo.Module(compiled.as_text()).work())
  # Forward, forward again, and twice as much backward, but for the gradient of
  # what the first layer reads, which is made in the loop nevertheless.
  one = 2 * BATCH // 8 * TOKENS * WIDTH * WIDTH
  assert sum(w.times * w.operations for w in work) == 4 * LAYERS * one
  assert 8 * 4 * LAYERS * one == flops.count(jax.grad(_loss), *args)
  # XLA's own count has the loops' bodies once.
  assert compiled.cost_analysis()["flops"] < 2 * 4 * one


def test_gradients_are_summed_over_all_devices():
  compiled, *_ = _compiled(1)
  work = hlo.Module(compiled.as_text()).work()
  found = [w for w in work if w.collective]
  assert {w.collective.kind for w in found} == {"all-reduce"}
  assert {w.collective.group for w in found} == {8}
  size = LAYERS * WIDTH * WIDTH * 4
  sent = sum(w.times * w.collective.sent for w in found)
  assert sent == pytest.approx(2 * 7 / 8 * size)


# As TPUs have it: a product of [2, 3, 4] and [4, 5] (its batch dimension is the
# window's), a batched product of [2, 3, 4] and [2, 3, 4] (a dilated window),
# what a loop reads of stacked weights, and a gather that runs beside others.
TPU = """
HloModule jit_step, is_scheduled=true

%slice_fusion (p0: bf16[6,4,5], p1: s32[]) -> bf16[4,5,1] {
  %p0 = bf16[6,4,5]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %ds = bf16[1,4,5]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,4,5}
  ROOT %bc = bf16[4,5,1]{1,0,2:T(8,128)(2,1)} bitcast(%ds)
}

%start (q0: bf16[2,5]) -> (bf16[2,5], bf16[8,5]) {
  %q0 = bf16[2,5]{1,0} parameter(0)
  %ag.1 = bf16[8,5]{1,0:T(8,128)(2,1)} all-gather(%q0), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_1'}, dimensions={0}
  ROOT %cc.1 = (bf16[2,5]{1,0:S(1)}, bf16[8,5]{1,0:S(1)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%done (r0: bf16[2,5]) -> bf16[8,5] {
  %r0 = bf16[2,5]{1,0} parameter(0)
  %ag.2 = bf16[8,5]{1,0:T(8,128)(2,1)} all-gather(%r0), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_1'}, dimensions={0}
  ROOT %cc.2 = bf16[8,5]{1,0:S(1)} custom-call(%ag.2), custom_call_target="AsyncCollectiveDone"
}

%body (t: (s32[], bf16[2,3,4], bf16[6,4,5])) -> (s32[], bf16[2,3,4], bf16[6,4,5]) {
  %t = (s32[]{:T(128)}, bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)}, /*index=2*/bf16[6,4,5]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %w = bf16[6,4,5]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %wi = bf16[4,5,1]{1,0,2:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%slice_fusion
  %y = bf16[2,3,5]{2,1,0:T(8,128)(2,1)S(1)} convolution(%x, %wi), window={size=1}, dim_labels=0bf_io0->0bf
  %s = f32[2,3,3]{2,1,0:T(8,128)S(1)} convolution(%x, %x), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0oi->0bf
  %g.0 = bf16[2,5]{1,0:T(8,128)(2,1)} bitcast(%wi)
  %g.1 = (bf16[2,5]{1,0:S(1)}, bf16[8,5]{1,0:S(1)}) fusion(%g.0), kind=kCustom, calls=%start
  %g.2 = bf16[8,5]{1,0:S(1)} fusion(%g.0), kind=kCustom, calls=%done
  ROOT %out = (s32[]{:T(128)}, bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)}, bf16[6,4,5]{2,1,0:T(8,128)(2,1)}) tuple(%i, %x, %w)
}

%condition (c: (s32[], bf16[2,3,4], bf16[6,4,5])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)}, bf16[6,4,5]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: bf16[2,3,4], b: bf16[6,4,5]) -> bf16[2,3,4] {
  %a = bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[6,4,5]{2,1,0:T(8,128)(2,1)} parameter(1)
  %first = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)}, bf16[6,4,5]{2,1,0:T(8,128)(2,1)}) tuple(%first, %a, %b)
  %loop = (s32[]{:T(128)}, bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)}, bf16[6,4,5]{2,1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  ROOT %r = bf16[2,3,4]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_programs_for_tpus():
  work = list(hlo.Module(TPU).work())
  assert {w.times for w in work} == {6}
  products = [w.operations for w in work if w.opcode == "convolution"]
  # [6, 4] x [4, 5]; and of each of two, [3, 4] x [4, 3].
  assert products == [2 * 6 * 4 * 5, 2 * 2 * 3 * 4 * 3]
  # Products are of what lies on the chip. HBM: a layer of the stack, not all
  # six; and what is cut from it.
  slice_of_weights = next(w for w in work if w.opcode == "fusion")
  assert slice_of_weights.hbm_bytes == 4 * 5 * 2 + 4  # and which one
  (gather,) = [w for w in work if w.collective]
  assert gather.collective == hlo.Collective(
    "all-gather", 2 * 5 * 2, 4, 7, begins=True
  )
  assert gather.collective.sent == 3 * 2 * 5 * 2


@pytest.mark.parametrize("start, times", [(0, 3), (2, 2), (3, 2)])
def test_loops_may_take_several_at_a_time(start, times):
  """As those that multiply pieces of weights while chips hand on others."""
  steps = """
  %one = s32[]{:T(128)} constant(1)
  %i.1 = s32[]{:T(128)} add(%i, %one)
  %i.2 = s32[]{:T(128)} copy(%i.1)
  %i.3 = s32[]{:T(128)} add(%i.2, %one)
"""
  text = TPU.replace("  ROOT %out", f"{steps.strip(chr(10))}\n  ROOT %out")
  text = text.replace("tuple(%i, ", "tuple(%i.3, ")
  first = "%first = s32[]{:T(128)} constant"
  text = text.replace(f"{first}(0)", f"{first}({start})")
  assert {w.times for w in hlo.Module(text).work()} == {times}


def test_loops_may_start_from_what_is_given():
  text = TPU.replace("while(%tuple)", "while(%given)").replace(
    "  %loop =", "  %given = (s32[]) parameter(2)\n  %loop ="
  )
  assert {w.times for w in hlo.Module(text).work()} == {6}


# A sum of which each chip keeps a part, twice: TPUs number none of them.
SCATTER = """
HloModule jit_step

%scatter (s0: bf16[8,5]) -> bf16[2,5] {
  %s0 = bf16[8,5]{1,0} parameter(0)
  %ar = bf16[8,5]{1,0} all-reduce(%s0), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add
  %me = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = bf16[2,5]{1,0} dynamic-slice(%ar, %me, %zero), dynamic_slice_sizes={2,5}
}

ENTRY %main (a: bf16[8,5], b: bf16[8,5]) -> (bf16[2,5], bf16[2,5]) {
  %a = bf16[8,5]{1,0} parameter(0)
  %b = bf16[8,5]{1,0} parameter(1)
  %first = bf16[2,5]{1,0} fusion(%a), kind=kCustom, calls=%scatter
  %second = bf16[2,5]{1,0} fusion(%b), kind=kCustom, calls=%scatter
  ROOT %both = (bf16[2,5]{1,0}, bf16[2,5]{1,0}) tuple(%first, %second)
}
"""  # noqa: E501


# A gather that is begun before a loop, and goes on beside its products.
BESIDE = """
HloModule jit_step, is_scheduled=true

%start (q0: bf16[2,5]) -> (bf16[2,5], bf16[8,5]) {
  %q0 = bf16[2,5]{1,0} parameter(0)
  %ag.1 = bf16[8,5]{1,0} all-gather(%q0), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %cc.1 = (bf16[2,5]{1,0}, bf16[8,5]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p0: bf16[2,5], p1: bf16[8,5], p2: bf16[3,5], p3: bf16[5,4]) -> (bf16[3,4], bf16[2,5], bf16[8,5], bf16[8,5]) {
  %p0 = bf16[2,5]{1,0} parameter(0)
  %p1 = bf16[8,5]{1,0} parameter(1)
  %ag.2 = bf16[8,5]{1,0} all-gather(%p0), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
  %p2 = bf16[3,5]{1,0} parameter(2)
  %p3 = bf16[5,4]{1,0} parameter(3)
  %dot = bf16[3,4]{1,0:S(1)} convolution(%p2, %p3), dim_labels=bf_io->bf
  ROOT %all = (bf16[3,4]{1,0:S(1)}, bf16[2,5]{1,0}, bf16[8,5]{1,0}, bf16[8,5]{1,0}) tuple(%dot, %p0, %p1, %ag.2)
}

%body (t: (s32[], bf16[2,5], bf16[8,5], bf16[3,5], bf16[5,4])) -> (s32[], bf16[2,5], bf16[8,5], bf16[3,5], bf16[5,4]) {
  %t = (s32[], bf16[2,5]{1,0}, bf16[8,5]{1,0}, bf16[3,5]{1,0}, bf16[5,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = bf16[2,5]{1,0} get-tuple-element(%t), index=1
  %b = bf16[8,5]{1,0} get-tuple-element(%t), index=2
  %x = bf16[3,5]{1,0} get-tuple-element(%t), index=3
  %w = bf16[5,4]{1,0} get-tuple-element(%t), index=4
  %f = (bf16[3,4]{1,0:S(1)}, bf16[2,5]{1,0}, bf16[8,5]{1,0}, bf16[8,5]{1,0}) fusion(%a, %b, %x, %w), kind=kOutput, calls=%piece
  ROOT %out = (s32[], bf16[2,5]{1,0}, bf16[8,5]{1,0}, bf16[3,5]{1,0}, bf16[5,4]{1,0}) tuple(%i, %a, %b, %x, %w)
}

%condition (c: (s32[], bf16[2,5], bf16[8,5], bf16[3,5], bf16[5,4])) -> pred[] {
  %c = (s32[], bf16[2,5]{1,0}, bf16[8,5]{1,0}, bf16[3,5]{1,0}, bf16[5,4]{1,0}) parameter(0)
  %n = s32[] constant(6)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (q: bf16[2,5], x: bf16[3,5], w: bf16[5,4]) -> bf16[3,5] {
  %q = bf16[2,5]{1,0} parameter(0)
  %x = bf16[3,5]{1,0} parameter(1)
  %w = bf16[5,4]{1,0} parameter(2)
  %s = (bf16[2,5]{1,0}, bf16[8,5]{1,0}) fusion(%q), kind=kCustom, calls=%start
  %s.0 = bf16[2,5]{1,0} get-tuple-element(%s), index=0
  %s.1 = bf16[8,5]{1,0} get-tuple-element(%s), index=1
  %zero = s32[] constant(0)
  %tuple = (s32[], bf16[2,5]{1,0}, bf16[8,5]{1,0}, bf16[3,5]{1,0}, bf16[5,4]{1,0}) tuple(%zero, %s.0, %s.1, %x, %w)
  %loop = (s32[], bf16[2,5]{1,0}, bf16[8,5]{1,0}, bf16[3,5]{1,0}, bf16[5,4]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %r = bf16[3,5]{1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501


def test_what_goes_on_beside_a_loop_is_sent_once():
  start, piece = hlo.Module(BESIDE).work()
  assert (start.times, piece.times) == (1, 6)
  assert start.collective.sent == 3 * 2 * 5 * 2
  assert piece.collective is None
  # The product's sides; its result stays on the chip, the rest is handed on.
  assert piece.operations == 2 * 3 * 5 * 4
  assert piece.hbm_bytes == 2 * (3 * 5 + 5 * 4)


def test_kernels_count_as_what_they_say():
  text = """
HloModule m

ENTRY %main (a: bf16[8,5]) -> bf16[8,5] {
  %a = bf16[8,5]{1,0} parameter(0)
  %k = bf16[8,5]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %l = bf16[8,5]{1,0} custom-call(%k), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"70","transcendentals":"5"}}}
}
"""  # noqa: E501
  silent, telling = hlo.Module(text).work()
  assert silent == hlo.Work("kernel", 0, 0, 2 * 8 * 5 * 2, 1, True, None)
  bytes_ = 2 * 8 * 5 * 2
  assert telling == hlo.Work("custom-call", 70, 70, bytes_, 1, True, None)


def test_memory_that_is_given_is_not_written():
  text = """
HloModule m

ENTRY %main (a: bf16[8,5]) -> bf16[16,5] {
  %a = bf16[8,5]{1,0} parameter(0)
  %b = bf16[16,5]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %c = s32[] constant(0)
  ROOT %d = bf16[16,5]{1,0} dynamic-update-slice(%b, %a, %c, %c)
}
"""
  (update,) = hlo.Module(text).work()
  assert update.hbm_bytes == 2 * 8 * 5 * 2


@pytest.mark.parametrize(
  "dtype, asked, passes",
  [
    ("f32", "", 1),
    ("f32", ", operand_precision={high,high}", 3),
    ("f32", ", operand_precision={highest,highest}", 6),
    # What is bfloat16 already has no lower halves.
    ("bf16", ", operand_precision={highest,highest}", 1),
  ],
)
def test_products_of_float32_are_several_of_bfloat16(dtype, asked, passes):
  text = f"""
HloModule m

%product (p: {dtype}[3,4], q: {dtype}[4,5]) -> f32[3,5] {{
  %p = {dtype}[3,4]{{1,0}} parameter(0)
  %q = {dtype}[4,5]{{1,0}} parameter(1)
  ROOT %c = f32[3,5]{{1,0}} convolution(%p, %q), dim_labels=bf_io->bf{asked}
}}

ENTRY %main (a: {dtype}[3,4], b: {dtype}[4,5]) -> f32[3,5] {{
  %a = {dtype}[3,4]{{1,0}} parameter(0)
  %b = {dtype}[4,5]{{1,0}} parameter(1)
  ROOT %f = f32[3,5]{{1,0}} fusion(%a, %b), kind=kOutput, calls=%product
}}
"""
  (work,) = hlo.Module(text).work()
  assert work.operations == 2 * 3 * 4 * 5
  assert work.bfloat16 == passes * work.operations


def test_sums_that_are_cut_are_scattered():
  work = list(hlo.Module(SCATTER).work())
  one = hlo.Collective("reduce-scatter", 8 * 5 * 2, 4)
  assert [w.collective for w in work] == [one, one]
  assert one.sent == 3 / 4 * 8 * 5 * 2


@pytest.mark.parametrize(
  "kind, sent",
  [
    ("all-reduce", 2 * 7 / 8 * 80),
    ("all-gather", 7 * 80),
    ("reduce-scatter", 7 / 8 * 80),
    ("all-to-all", 7 / 8 * 80),
  ],
)
def test_the_least_that_is_sent(kind, sent):
  """Of 8 chips with 80 bytes each, by a ring."""
  assert hlo.Collective(kind, 80, 8).sent == sent


def test_padding_is_no_work():
  line = (
    "%c = f32[1,4,1]{2,1,0} convolution(%x, %k), "
    "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
  )
  text = (
    "HloModule m\n\nENTRY %main (x: f32[1,4,1], k: f32[3,1,1]) -> f32[1,4,1] "
    "{\n  %x = f32[1,4,1]{2,1,0} parameter(0)\n"
    f"  %k = f32[3,1,1]{{2,1,0}} parameter(1)\n  {line}\n}}\n"
  )
  (work,) = hlo.Module(text).work()
  places = [(o, t) for o in range(4) for t in range(3) if 0 <= o + t - 1 < 4]
  assert work.operations == 2 * len(places)
  assert work.hbm_bytes == 4 * (4 + 3 + 4)
  assert np.isclose(len(places), 10)
