"""ALBEF and SIMLA: what they share, and where their gradients go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.toys import BOS, EOS, LENGTH, VOCAB
from vlp_jax.errors import UserError
from vlp_jax.methods import _matcher, base

METHODS = ("albef", "simla")
QUEUE = 12


def context(name, *overrides, step=2):
  return toys.context(
    step=step,
    ema_params=toys.params(name, *overrides, seed=1),
    method_state=toys.method_state(name, *overrides),
  )


def terms(name, params, batch, *overrides, **options):
  ctx = context(name, *overrides, **options)
  return toys.losses(name, *overrides)(params, batch, ctx)[1][0]


# --- Captions ---------------------------------------------------------------


def test_captions_have_no_end_symbol():
  text = np.array([[BOS, 7, 8, EOS, 0], [BOS, EOS, 0, 0, 0], [0] * 5])
  short, text_len = _matcher.shorten(text, np.array([4, 2, 0]))
  np.testing.assert_array_equal(
    short, [[BOS, 7, 8, 0], [BOS, 0, 0, 0], [0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(text_len, [3, 1, 1])
  assert not (np.asarray(short) == EOS).any()


@pytest.mark.parametrize("name", METHODS)
def test_padding_counts_for_nothing(name):
  params, batch = toys.params(name), toys.batch()
  batch["text_len"] = np.minimum(batch["text_len"], 6)
  expected = terms(name, params, batch)
  pads = np.arange(LENGTH) >= batch["text_len"][:, None]
  noise = np.random.default_rng(9).integers(4, VOCAB, batch["text"].shape)
  text = np.where(pads, noise, batch["text"]).astype(np.int32)
  actual = terms(name, params, batch | {"text": text})
  assert actual == expected


# --- Queues and the teacher's weight ----------------------------------------


@functools.cache
def _couple(name, *overrides):
  method = toys.method(name, *overrides)
  return toys.jit(
    lambda params, shared, batch, ctx: method.couple(
      params, shared, batch, ctx._replace(train=True)
    )
  )


@pytest.mark.parametrize("name", METHODS)
def test_the_queue_goes_round(name):
  ctx, params, draw = context(name), toys.params(name), np.random.default_rng(0)
  state = {k: np.array(v) for k, v in ctx.method_state.items()}
  for step in range(4):
    size, dim = 5, state["image_queue"].shape[1]
    shared = {
      key: draw.standard_normal((size, dim)).astype(np.float32)
      for key in ("image", "text", "teacher_image", "teacher_text")
    }
    ids = np.arange(size, dtype=np.int32) + 10 * step
    ctx = ctx._replace(
      method_state=_couple(name)(
        params, shared, {"image_id": ids}, ctx
      ).method_state
    )
    for i in range(size):
      at = (step * size + i) % QUEUE
      state["image_queue"][at] = shared["teacher_image"][i]
      state["text_queue"][at] = shared["teacher_text"][i]
      state["queue_id"][at] = ids[i]
    for key in ("image_queue", "text_queue", "queue_id"):
      np.testing.assert_array_equal(ctx.method_state[key], state[key])
    assert ctx.method_state["queue_pointer"] == (step + 1) * size % QUEUE


@pytest.mark.parametrize("queue", [0, QUEUE])
def test_itc_equals_numpy(queue):
  overrides = (f"method.queue_size={queue}",)
  ctx, params = context("albef", *overrides), toys.params("albef", *overrides)
  ctx = ctx._replace(step=jnp.int32(2))  # half of the ramp: alpha is 0.2
  draw = np.random.default_rng(0)
  shared = {
    key: draw.standard_normal((4, 12)).astype(np.float32) / 4
    for key in ("image", "text", "teacher_image", "teacher_text")
  }
  ids, state = np.array([0, 1, 2, 2]), dict(ctx.method_state)
  if queue:
    state["queue_id"] = jnp.full(QUEUE, -1).at[3].set(1)
    ctx = ctx._replace(method_state=state)
  got = _couple("albef", *overrides)(params, shared, {"image_id": ids}, ctx)
  loss = 0
  for mine, other in (("image", "text"), ("text", "image")):
    keys = shared[f"teacher_{other}"]
    key_ids = ids
    if queue:
      keys = np.concatenate([keys, state[f"{other}_queue"]])
      key_ids = np.concatenate([ids, state["queue_id"]])
    for i in range(4):
      columns = np.flatnonzero(
        (key_ids != ids[i]) | (np.arange(len(keys)) == i)
      )

      def softmax(x, columns=columns, keys=keys):
        e = np.exp(np.float64(keys[columns] @ x) / 0.2)
        return e / e.sum()

      target = 0.2 * softmax(shared[f"teacher_{mine}"][i])
      target += 0.8 * (columns == i)
      loss -= (target * np.log(softmax(shared[mine][i]))).sum() / 2
  mean = got.terms["itc"]
  np.testing.assert_allclose(mean.total / mean.weight, loss / 4, rtol=1e-5)


def test_the_teacher_s_weight_grows():
  method = toys.method("albef")
  values = [float(method.alpha_at(jnp.int32(step))) for step in range(7)]
  np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


# --- Gradients --------------------------------------------------------------

ITC = {"image_projection", "text_projection", "temperature"}
PATHS = {
  # What a term reaches, beside the stream and the vision tower.
  "itm": {"matching"},
  "mlm": {"words"},
  "mim": {"patch_head"},
  "psl": {"image_projection", "keyword_head"},
}


@functools.cache
def _term_gradients(name):
  method = toys.method(name)
  ctx = context(name)
  batch = toys.batch()

  def all_terms(params):
    out = method.forward(params, batch, ctx)
    coupled = method.couple(params, out.shared, batch, ctx)
    found = {**out.terms, **coupled.terms}
    return {k: m.total / m.weight for k, m in found.items()}

  return jax.device_get(toys.jit(jax.jacrev(all_terms))(toys.params(name)))


@pytest.mark.parametrize(
  "name, term",
  [("albef", t) for t in ("itc", "itm", "mlm")]
  + [("simla", t) for t in ("itc", "itm", "mlm", "mim", "psl")],
)
def test_gradients_go_where_they_should(name, term):
  gradient = _term_gradients(name)[term]
  reached = {
    part
    for part, leaves in gradient.items()
    if any(np.any(leaf) for leaf in jax.tree.leaves(leaves))
  }
  expected = ITC if term == "itc" else PATHS[term]
  towers = {"vision", "vision_norm"} | ({"stream"} if term != "psl" else set())
  assert reached == expected | towers


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_reaches_the_teacher_or_the_queue(name):
  method, batch, params = toys.method(name), toys.batch(), toys.params(name)
  ctx = context(name)
  queues = {k: ctx.method_state[k] for k in ("image_queue", "text_queue")}

  def loss(ema_params, queues):
    new = ctx._replace(
      ema_params=ema_params, method_state={**ctx.method_state, **queues}
    )
    out = method.forward(params, batch, new)
    coupled = method.couple(params, out.shared, batch, new)
    found = {**out.terms, **coupled.terms}
    return sum(m.total / m.weight for m in found.values())

  gradients = toys.jit(jax.grad(loss, (0, 1)))(ctx.ema_params, queues)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


# --- Matching ---------------------------------------------------------------


def test_pairs_of_one_picture_are_no_negatives():
  method = toys.method("simla", "method.match_group=4")
  draw = np.random.default_rng(0)
  ids = np.array([7, 7, 7, 7, 1, 1, 2, 3], np.int32)

  def embeddings():
    return type(
      "E",
      (),
      dict(
        image=draw.standard_normal((8, 12)), text=draw.standard_normal((8, 12))
      ),
    )

  for seed in range(20):
    noise = np.random.default_rng(seed).gumbel(size=(2, 8, 4))
    drawn = method.negatives(
      toys.params("simla"), embeddings(), embeddings(), ids, noise
    )
    for index, exists in drawn:
      groups = np.arange(2)[:, None] * 4
      chosen = ids[np.asarray(index) + groups].reshape(-1)
      np.testing.assert_array_equal(exists, [0, 0, 0, 0, 1, 1, 1, 1])
      assert (chosen[4:] != ids[4:]).all()


@pytest.mark.parametrize("name", METHODS)
def test_match_scores_are_those_of_single_pairs(name):
  method, params = toys.method(name), toys.params(name)
  batch, texts = toys.batch(3), toys.batch(6, seed=1)
  see, score = toys.jit(method.match_state), toys.jit(method.match_score)
  state = see(params, batch)
  assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))
  scores = score(
    params,
    state,
    texts["text"].reshape(3, 2, -1),
    texts["text_len"].reshape(3, 2),
  )
  fuse = toys.module_call(name, (), "fuse")
  for i in range(3):
    own = jax.tree.map(lambda x, i=i: x[i : i + 1], state)
    for k in range(2):
      text, text_len = _matcher.shorten(
        texts["text"][[2 * i + k]], texts["text_len"][[2 * i + k]]
      )
      fused = fuse(
        params,
        text,
        text_len,
        jax.tree.map(lambda x: x.swapaxes(0, 1), own),
        np.zeros((1, 1), np.int32),
      )
      logits = method.apply(params, "match_logits", fused)[0]
      np.testing.assert_allclose(
        scores[i, k], logits[1] - logits[0], rtol=1e-4, atol=1e-5
      )


def test_the_gradient_of_a_match_by_attention():
  """Against finite differences."""
  name, draw = "simla", np.random.default_rng(0)
  method, params = toys.method(name), toys.params(name)
  batch = toys.batch(2)
  text, text_len = _matcher.shorten(batch["text"], batch["text_len"])
  attention, gradient = toys.jit(method.attention_gradient)(
    params, batch["image"], text, text_len
  )
  np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
  shape = (2, *attention.shape)
  direction = np.zeros(shape, np.float32)
  direction[0] = draw.standard_normal(attention.shape)

  @toys.jit
  def logits(delta):
    patches = method.apply(params, "see", batch["image"])
    kv = method.apply(params, "project", patches)
    tree = {"attention_map": delta}
    for part in ("cross_attention", "layers", "transformer", "stream"):
      tree = {part: tree}
    fused = method.module.apply(
      {"params": params, "perturbations": tree},
      text,
      text_len,
      kv,
      np.zeros((2, 1), np.int32),
      method="fuse",
    )
    return method.apply(params, "match_logits", fused)[:, 1].sum()

  step = 3e-3 * jnp.asarray(direction)
  expected = (float(logits(step)) - float(logits(-step))) / 6e-3
  np.testing.assert_allclose(
    np.sum(gradient * direction[0]), expected, rtol=2e-3
  )


@pytest.mark.parametrize("name", METHODS)
def test_maps(name):
  method, params, batch = toys.method(name), toys.params(name), toys.batch()
  assert method.readouts == ("gradcam",)
  read = toys.jit(
    lambda params, batch, mask=None: method.patch_text_map(
      params, batch, "gradcam", mask
    )
  )
  maps = read(params, batch)
  side = toys.IMAGE // toys.PATCH
  assert maps.shape == (4, side, side) and (np.asarray(maps) >= 0).all()
  parts = []
  for places in (range(0, 3), range(3, LENGTH)):
    mask = np.isin(np.arange(LENGTH), places)
    mask = np.broadcast_to(mask, batch["text"].shape)
    parts.append(read(params, batch, mask))
  np.testing.assert_allclose(sum(parts), maps, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_attention_maps_are_the_last_layer_s(name):
  params, batch = toys.params(name), toys.batch()
  method = toys.method(name)
  last = method.module.stream.transformer.depth - 1
  method = dataclasses.replace(method, grounding_layer=last)
  maps = toys.jit(method.attention_maps)(params, batch)
  attention, _ = toys.jit(method.attention_gradient)(
    params, batch["image"], *_matcher.shorten(batch["text"], batch["text_len"])
  )
  side = toys.IMAGE // toys.PATCH
  assert maps.shape == (4, LENGTH - 1, 1, side, side)
  expected = np.asarray(attention).max(axis=1)[:, :, 1:].reshape(maps.shape)
  np.testing.assert_allclose(maps, expected, rtol=1e-5)


# --- Fields -----------------------------------------------------------------


def test_dropout_is_the_student_s_unless_asked_for():
  batch, overrides = toys.batch(), ("model.stream.dropout=0.5",)
  quiet = terms("albef", toys.params("albef"), batch)
  one = terms("albef", toys.params("albef"), batch, *overrides)
  both = terms(
    "albef",
    toys.params("albef"),
    batch,
    *overrides,
    "method.teacher_dropout=true",
  )
  # Soft targets are the teacher's; what it reads of pictures has no dropout.
  assert quiet["mlm"] != one["mlm"] != both["mlm"]
  again = terms("albef", toys.params("albef"), batch, *overrides)
  assert again == one


@pytest.mark.parametrize(
  "field, says",
  [
    ("method.mask_id=40", "no id of a vocabulary"),
    ("method.queue_size=7", "smaller than config.batch_size=8"),
    ("method.match_group=1", "a second pair"),
    ("method.grounding_layer=2", "cross-attention are 0 to 0"),
    ("model.stream.text_depth=2", "for text alone"),
    ("ema.decay=0.0", "momentum teacher needs"),
  ],
)
def test_impossible_fields(field, says):
  with pytest.raises(UserError, match=says):
    base.get("albef", toys.config("albef", "method.queue_size=8", field))


def test_chunks_cut_the_batch_that_negatives_are_from():
  cut = ("method.match_group=0", "accumulate=4")
  with pytest.raises(UserError, match="set it to 2 or a part of that"):
    base.get("albef", toys.config("albef", *cut))


def test_a_run_starts_from_a_file(tmp_path):
  method, params = toys.method("albef"), toys.params("albef")
  path, kernel = tmp_path / "start.npz", np.ones((16, 12), np.float32)
  np.savez(path, **{"image_projection/projection/kernel": kernel})
  started = dataclasses.replace(method, start_file=str(path))
  new, state = started.start(params, {}, None)
  np.testing.assert_array_equal(
    new["image_projection"]["projection"]["kernel"], kernel
  )
  del new["image_projection"]
  rest = {k: v for k, v in params.items() if k != "image_projection"}
  toys.assert_trees_equal(new, rest)
  assert state == {}
  for arrays, says in (
    ({"image_projection/projection/kernel": kernel.T}, r"\(16, 12\)"),
    ({"nothing/kernel": kernel}, "nothing/kernel is no parameter"),
  ):
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=says):
      started.start(params, {}, None)
  path.write_bytes(b"no arrays")
  with pytest.raises(UserError, match="file of parameters"):
    started.start(params, {}, None)
