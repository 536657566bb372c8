"""SIMLA's step against numbers of the release's code.

They were measured by running that code (PyTorch, float32, dropout off) at toy
size on weights and inputs that are sines of their index, and checked by a
float64 NumPy implementation of the paper.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from vlp_jax import config as config_lib
from vlp_jax.convert import albef as convert
from vlp_jax.losses import keywords
from vlp_jax.methods import base
from vlp_jax.methods._fusion import Embeddings
from vlp_jax.methods.simla import Draws
from vlp_jax.ops import patches, token_mask

B, L, N, VOCAB, CODES, QUEUE = 3, 9, 16, 97, 8192, 33
SIZES = (
  "batch_size=3",
  "data.image_size=32",
  f"tokenizer.vocab_size={VOCAB}",
  f"tokenizer.max_len={L + 1}",
  "model.embed_dim=16",
  "model.vision.patch_size=8",
  "model.vision.width=48",
  "model.vision.depth=2",
  "model.vision.num_heads=4",
  "model.stream.width=48",
  "model.stream.num_heads=4",
  "model.stream.mlp_ratio=2.0",
  "model.stream.max_len=40",
  "model.stream.dropout=0.0",
  "model.remat=none",
  "method.visual_tokenizer=patches",
  "method.mask_patches=6",
  "method.mask_block=1",
  "method.mask_id=3",
  "method.match_group=3",
  f"method.queue_size={QUEUE}",
  "method.teacher_dropout=false",
  "method.alpha_ramp_steps=1",
)
HIDDEN = [[3, 4, 5, 6, 7], [0, 5, 6, 9], [10, 11, 12, 13, 14, 15]]
WORDS = [[2, 5], [3], [1, 8]]


def fill(name, shape):
  index = np.arange(np.prod(shape, dtype=int))
  s = np.sin(0.7 * index + zlib.crc32(name.encode()) % 997)
  if name.endswith("weight") and ("norm" in name or "LayerNorm" in name):
    s = 1 + 0.1 * s
  else:
    s = (0.05 if name.endswith("bias") else 0.2) * s
  return s.reshape(shape).astype(np.float32)


def shapes():
  """Names and shapes of the release's tensors at toy size."""
  d, ff = 48, 96
  found = {
    "visual_encoder.cls_token": (1, 1, d),
    "visual_encoder.pos_embed": (1, 1 + N, d),
    "visual_encoder.mask_token": (1, 1, d),
    "visual_encoder.patch_embed.proj.weight": (d, 3, 8, 8),
    "visual_encoder.patch_embed.proj.bias": (d,),
    "text_encoder.bert.embeddings.word_embeddings.weight": (VOCAB, d),
    "text_encoder.bert.embeddings.position_embeddings.weight": (40, d),
    "text_encoder.cls.predictions.bias": (VOCAB,),
    "temp": (),
  }

  def dense(name, out, into):
    found[f"{name}.weight"], found[f"{name}.bias"] = (out, into), (out,)

  def norm(name):
    found[f"{name}.weight"] = found[f"{name}.bias"] = (d,)

  for i in range(2):
    block = f"visual_encoder.blocks.{i}"
    norm(f"{block}.norm1")
    norm(f"{block}.norm2")
    dense(f"{block}.attn.qkv", 3 * d, d)
    dense(f"{block}.attn.proj", d, d)
    dense(f"{block}.mlp.fc1", 4 * d, d)
    dense(f"{block}.mlp.fc2", d, 4 * d)
  norm("visual_encoder.norm")
  norm("text_encoder.bert.embeddings.LayerNorm")
  for i in range(12):
    layer = f"text_encoder.bert.encoder.layer.{i}"
    for kind in ("attention", "crossattention"):
      for part in ("query", "key", "value"):
        dense(f"{layer}.{kind}.self.{part}", d, d)
      dense(f"{layer}.{kind}.output.dense", d, d)
      norm(f"{layer}.{kind}.output.LayerNorm")
    dense(f"{layer}.intermediate.dense", ff, d)
    dense(f"{layer}.output.dense", d, ff)
    norm(f"{layer}.output.LayerNorm")
  dense("text_encoder.cls.predictions.transform.dense", d, d)
  norm("text_encoder.cls.predictions.transform.LayerNorm")
  for name, out, into in (
    ("vision_proj", 16, d),
    ("text_proj", 16, d),
    ("itm_head", 2, d),
    ("mim_head", CODES, d),
    ("concept_head", VOCAB, 16),
  ):
    dense(name, out, into)
  return found


@functools.cache
def config():
  return config_lib.load(
    "configs/simla.py:reference",
    [*SIZES, f"method.visual_vocab_size={CODES}"],
  )


@functools.cache
def method():
  return base.get("simla", config())


def params(momentum=False):
  """The student's weights, or the teacher's: their names have `_m`."""

  def named(name):
    top, dot, rest = name.partition(".")
    return f"{top}_m{dot}{rest}" if momentum else name

  state = {name: fill(named(name), shape) for name, shape in shapes().items()}
  state["temp"] = np.float32(0.07)
  return convert.from_albef(state, config())


def text():
  ids = np.zeros((B, L), np.int32)
  for b in range(B):
    ids[b] = [1] + [((7 * j + 11 * b) % 90) + 5 for j in range(1, L)]
  ids[1, 6:] = 0
  return ids, np.array([9, 6, 9], np.int32)


@functools.cache
def inputs():
  ids, text_len = text()
  image = np.sin(0.011 * np.arange(B * 3 * 32 * 32)).reshape(B, 3, 32, 32)
  batch = dict(
    image=image.transpose(0, 2, 3, 1).astype(np.float32),
    text=ids,
    text_len=text_len,
    image_id=np.arange(B, dtype=np.int32),
    index=np.arange(B, dtype=np.int32),
  )
  hidden = np.zeros((B, N), bool)
  chosen = np.zeros((B, L), bool)
  for b in range(B):
    hidden[b, HIDDEN[b]] = True
    chosen[b, WORDS[b]] = True
  words = token_mask.gather(np.where(chosen, 3, ids), ids, chosen, L)
  draws = Draws(words, jnp.asarray(hidden), jnp.zeros((2, B, B)))
  codes = (131 * np.arange(B * N) % CODES).reshape(B, N).astype(np.int32)
  queues = {}
  for name in ("image_queue", "text_queue"):
    queue = fill(name, (16, QUEUE))
    queues[name] = (queue / np.linalg.norm(queue, axis=0)).T
  state = queues | {
    "queue_id": np.full(QUEUE, -1, np.int32),
    "queue_pointer": np.int32(0),
  }
  return batch, draws, codes, jax.tree.map(jnp.asarray, state)


@pytest.fixture(autouse=True)
def _pixels(monkeypatch):
  """The pictures are floats already."""
  monkeypatch.setattr(patches, "normalize", lambda image: image)


def close(actual, expected, tolerance=1e-4):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def check(array, norm, first):
  if norm is not None:
    close(np.linalg.norm(array), norm)
  close(np.asarray(array).reshape(-1)[:3], first)


def test_activations():
  batch, draws, _, _ = inputs()
  student = params()

  def call(name, *args):
    return toys.apply(method(), name)(student, *args)

  image, ids, text_len = batch["image"], batch["text"], batch["text_len"]
  patches = call("see", image)
  check(patches, 49.415114, [-1.339736, 1.175652, 0.213486])
  hidden = call("see", image, draws.patches)
  check(hidden, 49.436794, [1.256369, -1.064446, 0.499088])
  f_image = call("embed_image", patches)
  check(f_image, None, [0.225289, 0.107259, -0.341462])
  embedded = call("embed_text", ids)
  check(embedded, 36.064698, [-1.392486, -1.235731, -0.439666])
  f_text, tokens = call("read", embedded, text_len)
  check(tokens, 36.781969, [-2.251364, 0.242349, 0.439160])
  check(f_text, None, [-0.151375, 0.337730, -0.252703])
  rows = np.arange(B)[None]
  fused = call(
    "text_given_image", embedded, text_len, call("project", patches), rows
  )
  check(fused, 36.773358, [-2.249424, -0.203359, 0.555659])
  logits = call("match_logits", fused)
  check(logits, 7.442655, [-3.824028, 1.985206, -3.595532])
  drawn = call("image_given_text", hidden, embedded, text_len)
  check(drawn, 50.297140, [-1.637994, -0.476266, 0.513442])
  check(call("word_logits", fused), 18.752001, [0.044783, -0.394815, 0.363109])


def teacher():
  """The release updates its teacher at the start of a step."""
  return jax.tree.map(
    lambda m, p: 0.995 * m + 0.005 * p, params(momentum=True), params()
  )


@functools.cache
def compiled_step(axis):
  """One step from the filled state: terms, gradient, new state."""
  built = dataclasses.replace(method(), mlm_axis=axis)
  batch, draws, codes, state = inputs()

  def loss(student, number):
    ctx = toys.context(step=number)._replace(
      ema_params=teacher(), method_state=state
    )
    out = built.losses(student, batch, draws, codes, ctx)
    coupled = built.couple(student, out.shared, batch, ctx)
    terms = {**out.terms, **coupled.terms}
    terms = {name: mean.total / mean.weight for name, mean in terms.items()}
    return sum(terms.values()), (terms, coupled.method_state)

  return toys.jit(jax.value_and_grad(loss, has_aux=True))


def step(alpha_on, axis="sequence"):
  """As `compiled_step`; the teacher has no say in the first step."""
  run = compiled_step(axis)
  (_, (terms, new)), gradient = run(params(), int(alpha_on))
  return terms, gradient, new


def norm(gradient, *names):
  leaves = [x for name in names for x in jax.tree.leaves(gradient[name])]
  return np.sqrt(sum(np.sum(np.square(x)) for x in leaves))


def assert_close(actual, expected):
  for name, value in expected.items():
    np.testing.assert_allclose(
      actual[name], value, rtol=0, atol=1e-4, err_msg=name
    )


# Three rows have no fifth position with a vote; this is without any there.
PSL = {False: 0.693266, True: 0.693060}


def test_losses_without_the_teacher():
  terms, gradient, new = step(alpha_on=False)
  assert_close(terms, dict(mlm=4.274631, itc=9.778393, itm=3.884447))
  assert_close(terms, dict(mim=10.268483))
  close(terms["psl"], PSL[False], 2e-6)
  for names, value in (
    (("vision", "vision_norm"), 95.337951),
    (("stream", "words"), 151.448267),
    (("image_projection",), 0.346160),
    (("text_projection",), 7.103443),
    (("matching",), 6.705504),
    (("patch_head",), 1.839739),
  ):
    # Of other sizes than the losses, so relative; and within 1e-4 for most.
    np.testing.assert_allclose(norm(gradient, *names), value, rtol=2e-5)
  value = gradient["temperature"]["value"]
  np.testing.assert_allclose(value, -114.195679, rtol=2e-5)
  assert new["queue_pointer"] == 3
  close(new["image_queue"][0, :3], [-0.217290, -0.056051, 0.377351])


@pytest.mark.parametrize(
  "axis, mlm", [("sequence", 3.447043), ("vocabulary", 4.454414)]
)
def test_losses_with_the_teacher(axis, mlm):
  terms, _, _ = step(alpha_on=True, axis=axis)
  assert_close(terms, dict(mlm=mlm, itc=12.520209, itm=3.884447, mim=9.680502))
  close(terms["psl"], PSL[True], 2e-6)


def test_negatives():
  batch, draws, _, _ = inputs()

  def embeddings(params):
    x = toys.apply(method(), "embed_text")(params, batch["text"])
    text, _ = toys.apply(method(), "read")(params, x, batch["text_len"])
    image = toys.apply(method(), "encode_image")(params, batch["image"])
    return Embeddings(image, text)

  (images, _), (texts, _) = method().negatives(
    params(),
    embeddings(params()),
    embeddings(teacher()),
    batch["image_id"],
    draws.noise,
  )
  np.testing.assert_array_equal(images, [[2, 0, 0]])
  np.testing.assert_array_equal(texts, [[1, 0, 0]])


@functools.cache
def passes_of_the_teacher(hidden, whole, copies=1):
  """What the teacher makes of hidden words (at no picture) and of captions."""
  batch, _, _, _ = inputs()
  built, ema = method(), teacher()
  x = toys.apply(built, "embed_text")(ema, batch["text"])
  patches = toys.apply(built, "see")(params(), batch["image"])
  x, patches, text_len = (
    jnp.repeat(a, copies, axis=0) for a in (x, patches, batch["text_len"])
  )
  hidden = (jnp.zeros_like(patches), x) if hidden else None
  whole = (patches, x) if whole else None
  return toys.jit(built._teach)(ema, hidden, whole, text_len, None)


def keywords_of_the_teacher():
  """Attention of the first token, in the teacher, to whole captions."""
  return passes_of_the_teacher(True, True)[1]


def test_a_pass_that_is_not_asked_for_is_not_run():
  filled, attention = passes_of_the_teacher(True, True)
  # Both together are one pass of twice the rows. So is one of all rows twice,
  # and sums of equal shapes are made in the same order on every processor.
  only_filled, nothing = passes_of_the_teacher(True, False, copies=2)
  np.testing.assert_allclose(only_filled[::2], filled, atol=1e-6)
  assert nothing is None
  nothing, only_attention = passes_of_the_teacher(False, True, copies=2)
  np.testing.assert_allclose(only_attention[::2], attention, atol=1e-6)
  assert nothing is None
  assert passes_of_the_teacher(False, False) == (None, None)


def test_votes_and_keywords():
  votes = keywords.votes(keywords_of_the_teacher(), None)
  np.testing.assert_array_equal(
    votes,
    [
      [4, 0, 0, 4, 0, 3, 1, 0, 4],
      [4, 4, 0, 4, 4, 0, 0, 0, 0],
      [4, 4, 0, 4, 0, 0, 4, 0, 0],
    ],
  )
  batch, _, _, _ = inputs()
  ids, counted = method()._choose(
    keywords_of_the_teacher(), batch["text"], batch["text_len"]
  )
  chosen = [set(row[c].tolist()) for row, c in zip(ids, counted, strict=True)]
  places = [[3, 5, 6, 8], [1, 3, 4], [1, 3, 6]]
  assert chosen == [
    set(batch["text"][b, p].tolist()) for b, p in enumerate(places)
  ]


@pytest.mark.parametrize("alpha, expected", [(0.0, 0.693277), (0.4, 0.693067)])
def test_the_keyword_loss_with_the_release_s_picks(alpha, expected):
  """There, a sort's whim chose position 7 of rows 1 (a pad) and 2."""
  batch, _, _, _ = inputs()
  ids, counted = method()._choose(
    keywords_of_the_teacher(), batch["text"], batch["text_len"]
  )
  ids = np.concatenate([ids, batch["text"][:, 7:8]], axis=1)
  counted = np.concatenate([counted, [[False], [True], [True]]], axis=1)

  def loss(student):
    mean = method()._keyword_term(
      (student, method().apply(student, "see", batch["image"])),
      (teacher(), method().apply(teacher(), "see", batch["image"])),
      ids,
      jnp.asarray(counted),
      alpha,
    )
    return mean.total / mean.weight

  value, gradient = toys.jit(jax.value_and_grad(loss))(params())
  close(value, expected, 1e-6)
  if not alpha:
    close(norm(gradient, "keyword_head"), 0.067743, 1e-6)
