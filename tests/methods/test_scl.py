"""SCL: its masks, its losses against separate passes, its gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from vlp_jax.errors import UserError
from vlp_jax.losses import matching
from vlp_jax.methods import base
from vlp_jax.ops import masking

GLSCL = ("method.patch_weight=0.2", "method.token_weight=0.2")
FRAMES = 3
# Clips compile as long again.
pictures_and_clips = pytest.mark.parametrize(
  "frames", [0, pytest.param(FRAMES, marks=pytest.mark.slow)]
)


def batch(frames=0, size=8):
  found = toys.batch(size)
  if frames:
    shape = (size, frames, toys.IMAGE, toys.IMAGE, 3)
    draw = np.random.default_rng(1)
    found["image"] = draw.integers(0, 256, shape, dtype=np.uint8)
  return found


def numpy_s(a, b, ids, temperature):
  """The release's NormSoftmaxLoss, without pairs of one picture."""
  a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
  cosines = a @ b.T
  assert np.abs(cosines).max() <= 1 + 1e-6  # along channels, never frames
  logits = np.float64(cosines) / temperature
  allowed = (ids[:, None] != ids) | np.eye(len(ids), dtype=bool)
  weights = np.where(allowed, np.exp(logits - logits.max()), 0)
  share = np.diag(weights)
  return sum(-np.log(share / weights.sum(axis)).mean() for axis in (0, 1))


# --- The step against one pass for each loss ---------------------------------


def separately(overrides, params, data, draws):
  """Every loss with forward passes of its own, as in the release."""
  method = toys.method("scl", *overrides)

  def call(name, *args):
    return toys.module_call("scl", overrides, name)(params, *args)

  image, text, text_len = data["image"], data["text"], data["text_len"]
  ids, size = data["image_id"], len(data["image_id"])

  def fused(text, *, keep=None, hidden=None, rows=None):
    patches = call("embed", image, hidden)
    seen = call("see", patches, keep)
    if rows is not None:
      seen = jax.tree.map(lambda x: x[rows], seen)
    return call("fuse", call("read", text, text_len), text_len, seen)

  def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)

  embeddings = [
    call("encode_text", text, text_len),
    call("encode_image", image),
  ]
  found = {"itc": numpy_s(*map(np.asarray, embeddings), ids, 0.2)}

  rows, match = pairs_by_hand(method, draws, ids)
  logits = call("match_logits", *fused(text, rows=rows))
  found["itm"] = np.mean(matching.match_loss(logits, match))

  words = draws.words
  logits = call("word_logits", fused(words.text)[0])
  log_p = np.asarray(jax.nn.log_softmax(logits))
  log_p = log_p[np.arange(size)[:, None], words.places, words.labels]
  found["mlm"] = -np.sum(log_p * words.weights) / np.sum(words.weights)

  text_whole, image_part = fused(text, keep=draws.keep)
  text_part, image_whole = fused(draws.part.text)
  found["mvsc"] = np.mean(
    [
      numpy_s(
        *(np.asarray(x.frames[:, f]) for x in (image_part, image_whole)),
        ids,
        0.03,
      )
      for f in range(image_part.frames.shape[1])
    ]
  )
  found["mlsc"] = numpy_s(
    *(np.asarray(x[:, 0]) for x in (text_part, text_whole)), ids, 0.03
  )
  if method.token_weight:
    places, weights = draws.part.places, draws.part.weights
    found["token"] = numpy_tokens(
      *(unit(masking.take(x, places)) for x in (text_part, text_whole)),
      np.asarray(weights) > 0,
      ids,
      method.match_group,
    )
  if method.patch_weight:
    hidden = masking.scatter_mask(draws.patches, toys.PATCHES)
    frames = image_whole.frames.shape[1]
    if image.ndim == 5:
      hidden = np.repeat(np.asarray(hidden)[:, None], frames, axis=1)
    _, covered = fused(text, hidden=hidden)
    found["patch"] = numpy_tokens(
      *(
        unit(
          np.concatenate(
            [
              masking.take(
                x.patches[:, f * toys.PATCHES :][:, : toys.PATCHES],
                draws.patches,
              )
              for f in range(frames)
            ],
            axis=1,
          )
        )
        for x in (covered, image_whole)
      ),
      True,
      ids,
      method.match_group,
    )
  return found


def pairs_by_hand(method, draws, ids):
  """Rows of pictures that are shown, and whether they are the texts' own."""
  g = method.match_group
  rows, match = np.arange(len(ids)), np.ones(len(ids), int)
  for start in range(0, len(ids), g):
    group = np.arange(start, start + g)
    for i in group[np.argsort(draws.lot[group])][g // 2 :]:
      noise = np.where(ids[group] != ids[i], draws.noise[i], -np.inf)
      if np.isfinite(noise).any():
        rows[i], match[i] = start + np.argmax(noise), 0
  return rows, match


def numpy_tokens(recovered, complete, real, ids, group):
  """InfoNCE among the tokens of a group, token by token."""
  real = np.broadcast_to(real, recovered.shape[:2])
  losses = []
  for start in range(0, len(ids), group):
    members = [
      (i, k)
      for i in range(start, start + group)
      for k in range(recovered.shape[1])
      if real[i, k]
    ]
    for i, k in members:
      others = [(j, m) for j, m in members if (j == i or ids[j] != ids[i])]
      own = np.float64(recovered[i, k] @ complete[i, k]) / 0.03
      rows = [recovered[i, k] @ complete[j] for j in others]
      columns = [recovered[j] @ complete[i, k] for j in others]
      for scores in (rows, columns):
        losses.append(np.log(np.sum(np.exp(np.float64(scores) / 0.03))) - own)
  return np.sum(losses) / len(losses) * 2


@pictures_and_clips
def test_the_step_equals_separate_passes(frames):
  overrides = ("scl", *GLSCL)
  data, ctx = batch(frames), toys.context()
  method, params = toys.method(*overrides), toys.params(*overrides)
  draws = jax.device_get(toys.jit(method.draw)(data, ctx))
  expected = separately(GLSCL, params, data, draws)
  _, (terms, _) = toys.losses(*overrides)(params, data, ctx)
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)


# --- Masks -------------------------------------------------------------------

RELEASE = (
  "scl",
  "tokenizer.max_len=50",
  "model.text.max_len=50",
  "method.word_pool=padded",
  "method.text_mask=replacement",
)


@functools.cache
def _drawn(overrides, lengths, size=20_000):
  """Draws for captions of so many words beside their first and last ids."""
  method = toys.method(*overrides)
  length = toys.config(*overrides).tokenizer.max_len
  text_len = np.resize(np.array(lengths) + 2, size).astype(np.int32)
  data = dict(
    index=np.arange(size, dtype=np.int32),
    text=np.full((size, length), 7, np.int32),
    text_len=text_len,
    image=np.zeros((size, toys.IMAGE, toys.IMAGE, 3), np.uint8),
  )
  draws = jax.device_get(toys.jit(method.draw)(data, toys.context()))
  return text_len - 2, draws


def _hidden(words):
  return words.weights.sum(axis=1)


def test_the_words_that_the_release_hides():
  """Draws from pads too: 8 of 50 places, and no word in 1 of 12 captions."""
  for count, none in ((5, 0.41), (12, 0.087), (20, 0.010)):
    _, draws = _drawn(RELEASE, (count,))
    hidden = _hidden(draws.words)
    assert hidden.max() <= 8
    np.testing.assert_allclose(hidden.mean() / count, 0.16, atol=0.005)
    np.testing.assert_allclose((hidden == 0).mean(), none, atol=0.01)
    assert (draws.words.labels[draws.words.weights > 0] == 7).all()


@pytest.mark.parametrize(
  "count, share", [(8, 0.41), (10, 0.41), (12, 0.35), (20, 0.37), (30, 0.36)]
)
def test_the_share_of_words_that_the_release_completes(count, share):
  _, draws = _drawn(RELEASE, (count,))
  found = _hidden(draws.part).mean() / count
  np.testing.assert_allclose(found, share, atol=0.01)


def test_masks_are_exact():
  counts, draws = _drawn(("scl",), tuple(range(1, toys.LENGTH - 1)), 400)
  np.testing.assert_array_equal(
    _hidden(draws.words), np.maximum(np.round(0.15 * counts), 1)
  )
  np.testing.assert_array_equal(
    _hidden(draws.part), np.maximum(np.round(np.float32(0.4) * counts), 1)
  )
  part = draws.part
  for row, places, real in zip(
    part.text, part.places, part.weights > 0, strict=True
  ):
    hidden = np.flatnonzero(row == 3)
    np.testing.assert_array_equal(hidden, np.sort(places[real]))
  # Neither the first id nor the last nor a pad.
  real = part.weights > 0
  assert part.places[real].min() == 1
  assert (part.places <= counts[:, None])[real].all()
  keep = draws.keep
  assert keep.shape == (400, int(toys.PATCHES * (1 - 0.8)))
  shares = np.bincount(keep.reshape(-1), minlength=toys.PATCHES) / keep.size
  np.testing.assert_allclose(shares, 1 / toys.PATCHES, atol=0.06)
  assert draws.patches.shape == (400, int(toys.PATCHES * 0.3))


def test_words_that_are_hidden_become_masks_most_often():
  _, draws = _drawn(("scl",), (8,))
  chosen = draws.words.weights > 0
  shown = np.take_along_axis(draws.words.text, draws.words.places, axis=1)
  shown = shown[chosen]
  np.testing.assert_allclose((shown == 3).mean(), 0.8, atol=0.015)
  np.testing.assert_allclose((shown == 7).mean(), 0.1, atol=0.01)


# --- Negatives ---------------------------------------------------------------


def _shown(overrides, data, seed=0):
  """For each text: which picture it is shown, whether it is its own."""
  method = toys.method(*overrides)
  params = toys.params(*overrides)
  draws = toys.jit(method.draw)(data, toys.context(seed=seed))
  number = jnp.arange(len(data["text"]), dtype=jnp.float32)
  seen = {"number": number[:, None]}
  shared = {
    name: np.random.default_rng(i).standard_normal((len(number), 12))
    for i, name in enumerate(("image", "text"))
  }
  shown, match = method._pair(params, seen, shared, data, draws)
  return shown["number"][:, 0].astype(int), match, shared


def test_half_of_a_group_is_shown_another_picture():
  data = batch()
  data["image_id"] = np.array([0, 1, 2, 3, 5, 5, 5, 5], np.int32)
  for seed in range(5):
    shown, match, _ = _shown(("scl",), data, seed)
    shown = np.asarray(shown)
    own = shown == np.arange(8)
    np.testing.assert_array_equal(match, own)
    assert own[:4].sum() == 2 and set(shown[:4]) <= {0, 1, 2, 3}
    assert own[4:].all()  # captions of one picture have no negatives


def test_hard_negatives_are_similar():
  overrides = ("scl", "method.negatives=hard", "method.match_group=0")
  data = batch()
  hits = {"hard": 0, "random": 0}
  for seed in range(8):
    for kind in hits:
      fields = (overrides[0], f"method.negatives={kind}", overrides[2])
      shown, match, shared = _shown(fields, data, seed)
      scores = shared["text"] @ shared["image"].T
      scores[data["image_id"][:, None] == data["image_id"]] = -np.inf
      wrong = np.asarray(match) == 0
      hits[kind] += (shown == scores.argmax(axis=1))[wrong].sum()
  assert hits["hard"] > 0.9 * 8 * 4 > 2 * hits["random"]


# --- Gradients ---------------------------------------------------------------


@functools.cache
def _gradients(frames, *overrides):
  fields = ("scl", *overrides)
  return toys.gradients(*fields)(
    toys.params(*fields), batch(frames), toys.context()
  )[0]


def test_complete_features_are_targets_and_get_no_gradient():
  method, params, data = toys.method("scl"), toys.params("scl"), batch()
  ctx = toys.context()
  forward = toys.jit(lambda p, batch: method.forward(p, batch, ctx).shared)
  shared = forward(params, data)

  def loss(shared):
    coupled = method.couple(params, shared, data, ctx)
    return sum(mean.total for mean in coupled.terms.values())

  gradient = toys.jit(jax.grad(loss))(shared)
  assert {k for k, g in gradient.items() if not np.any(g)} == {
    "image_whole",
    "text_whole",
  }


@pictures_and_clips
def test_completion_of_pictures_teaches(frames):
  """Normalised over frames, as in the release, it would not for one frame."""
  method, params = toys.method("scl"), toys.params("scl")
  data, ctx = batch(frames), toys.context()

  def loss(params):
    out = method.forward(params, data, ctx)
    mean = method.couple(params, out.shared, data, ctx).terms["mvsc"]
    return mean.total / mean.weight

  gradient = toys.jit(jax.grad(loss))(params)
  for part in ("vision", "fusion", "image_in"):
    squares = [np.sum(g * g) for g in jax.tree.leaves(gradient[part])]
    assert np.sqrt(sum(squares)) > 1e-2
  assert not any(np.any(g) for g in jax.tree.leaves(gradient["matching"]))


@pytest.mark.parametrize("chunk, rows", [(4, 4), (0, 40)])
def test_frames_have_no_logits_at_once(chunk, rows):
  """Those of one frame and `itc_chunk` rows, forward and backward."""
  size, frames = 40, 5
  method = toys.method("scl", f"method.itc_chunk={chunk}")
  forward = jax.eval_shape(
    lambda p: method.forward(p, batch(frames), toys.context()).shared,
    toys.params("scl"),
  )
  shared = {
    name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    for name, x in forward.items()
  }
  ids = {"image_id": jax.ShapeDtypeStruct((size,), np.int32)}

  def loss(shared, data):
    coupled = method.couple(toys.params("scl"), shared, data, toys.context())
    return sum(mean.total for mean in coupled.terms.values())

  program = jax.jit(jax.grad(loss), compiler_options=toys.compiler_options())
  text = program.lower(shared, ids).compile().as_text()
  found = re.findall(r"f32\[(\d+(?:,\d+)+)\]", text)
  shapes = [tuple(map(int, dims.split(","))) for dims in found]
  assert shared["image_part"].shape[:2] == (size, frames)
  widths = {x.shape[-1] for x in shared.values()}
  logits = [np.prod(s) for s in shapes if size in s and not widths & {*s}]
  # Beside losses and cosines of all frames.
  assert rows * size in logits and max(logits) <= max(rows, frames) * size


@pytest.mark.slow
def test_the_scale_of_contrastive_gradients():
  """An eighth of CL and of completion, and all of ITM and MLM."""
  off = (
    "method.contrastive_grad_scale=0.125",
    "method.match_weight=0.0",
    "method.word_weight=0.0",
  )
  whole = _gradients(0, "method.match_weight=0.0", "method.word_weight=0.0")
  part = _gradients(0, *off)
  toys.assert_gradients_close(jax.tree.map(lambda g: 8 * g, part), whole)


# --- What evaluators ask for -------------------------------------------------


@pictures_and_clips
def test_match_scores_are_those_of_single_pairs(frames):
  method, params = toys.method("scl"), toys.params("scl")
  data, texts = batch(frames, 3), toys.batch(6, seed=1)
  state = toys.jit(method.match_state)(params, data)
  scores = toys.jit(method.match_score)(
    params,
    state,
    texts["text"].reshape(3, 2, -1),
    texts["text_len"].reshape(3, 2),
  )
  fuse = toys.module_call("scl", (), "fuse")
  for i in range(3):
    own = jax.tree.map(lambda x, i=i: x[i : i + 1], state)
    for k in range(2):
      text = texts["text"][[2 * i + k]]
      text_len = texts["text_len"][[2 * i + k]]
      tokens = method.apply(params, "read", text, text_len)
      logits = method.apply(
        params, "match_logits", *fuse(params, tokens, text_len, own)
      )[0]
      np.testing.assert_allclose(
        scores[i, k], logits[1] - logits[0], rtol=1e-4, atol=1e-5
      )


@pictures_and_clips
def test_maps(frames):
  method, params, data = toys.method("scl"), toys.params("scl"), batch(frames)
  assert method.readouts == ("cross_attention",)
  read = toys.jit(
    lambda params, data, mask=None: method.patch_text_map(
      params, data, "cross_attention", mask
    )
  )
  maps = toys.jit(method.attention_maps)(params, data)
  side = toys.IMAGE // toys.PATCH
  assert maps.shape == (8, toys.LENGTH, max(frames, 1), side, side)
  assert (np.asarray(maps) > 0).all()
  whole = read(params, data)
  first_token = maps[:, 0] if frames else maps[:, 0, 0]
  np.testing.assert_allclose(whole, first_token, rtol=1e-6)
  first = np.zeros(data["text"].shape, bool)
  first[:, 0] = True
  np.testing.assert_allclose(read(params, data, first), whole, rtol=1e-6)
  second = np.roll(first, 1, axis=1)
  both = read(params, data, first | second)
  np.testing.assert_allclose(
    both, whole + read(params, data, second), rtol=1e-5
  )


def test_attention_maps_are_those_of_numpy():
  one_layer = ("model.fusion.depth=1",)
  method, data = toys.method("scl", *one_layer), batch(FRAMES, 3)
  params = toys.params("scl", *one_layer)
  maps = toys.jit(method.attention_maps)(params, data)
  text_len = data["text_len"]
  texts = toys.module_call("scl", one_layer, "read")(
    params, data["text"], text_len
  )
  seen = toys.jit(method.match_state)(params, data)
  fusion = jax.tree.map(lambda x: np.asarray(x, np.float64), params["fusion"])
  block = reference.pick(fusion["layers"]["text"], 0)
  for i, length in enumerate(text_len):
    image = np.concatenate([seen.frames[i], seen.patches[i]])
    text, image = texts[i] + fusion["types"][0], image + fusion["types"][1]
    own, cross = block["self_attention"], block["cross_attention"]
    qkv = reference.linear(own["qkv"], text)
    mask = np.arange(toys.LENGTH) < length
    heads, _ = reference.attention(*(qkv[:, j] for j in range(3)), mask)
    text = text + reference.linear(own["out"]["proj"], heads, 2)
    text = reference.layer_norm(block["self_norm"], text, 1e-12)
    query = reference.linear(cross["q"], text)
    keys = reference.linear(cross["kv"], image)
    _, weights = reference.attention(query, keys[:, 0], keys[:, 1])
    np.testing.assert_allclose(weights.sum(-1), 1)  # frame tokens included
    expected = weights.max(axis=0)[:, FRAMES:]
    np.testing.assert_allclose(
      maps[i].reshape(expected.shape), expected, rtol=1e-4
    )


def test_a_clip_of_one_frame_is_a_picture():
  data = batch()
  clip = data | {"image": data["image"][:, None]}
  run = toys.losses("scl", *GLSCL)
  params = toys.params("scl", *GLSCL)
  _, (picture, _) = run(params, data, toys.context())
  _, (one_frame, _) = run(params, clip, toys.context())
  for name, value in picture.items():
    np.testing.assert_allclose(one_frame[name], value, rtol=1e-6)


# --- Fields ------------------------------------------------------------------


def test_the_temperature_is_kept_where_asked():
  for kept, expected in ((True, 0.01), (False, 0.001)):
    method = toys.method("scl", f"method.keep_temperature={str(kept).lower()}")
    params = toys.params("scl")
    params["temperature"] = {"value": jnp.float32(0.001)}
    value = method.project(params)["temperature"]["value"]
    assert value == method.divisor(params) == np.float32(expected)


@pytest.mark.parametrize(
  "field, says",
  [
    ("method.mask_id=40", "no id of a vocabulary"),
    ("method.match_group=1", "a second pair"),
    ("method.negatives=easy", "not one of random, hard"),
    ("method.word_pool=all", "not one of words, padded"),
    ("method.text_mask=some", "not one of exact, replacement"),
    ("method.image_mask_ratio=1.0", "no share between 0 and 1"),
    ("model.vision.frame_fill=last", "not one of zero, interpolate"),
    ("model.vision.activation=tanh", "not one of gelu, quick_gelu, relu2"),
  ],
)
def test_impossible_fields(field, says):
  with pytest.raises(UserError, match=says):
    base.get("scl", toys.config("scl", field))
