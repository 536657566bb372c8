"""SyCoCa: against NumPy, against CoCa bit for bit, and what masks promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import toys
from tests.toys import LENGTH, PATCH, PATCHES
from vlp_jax import optim, sharding, skips, train_state, train_step
from vlp_jax.errors import UserError
from vlp_jax.methods import sycoca
from vlp_jax.ops import masking
from vlp_jax.ops import patches as patches_lib

HIDDEN = 4  # round(0.5 * 9) patches
TOKENS = "method.mask_stage=tokens"
SHARED = "method.decoders=shared"


@functools.cache
def _parts(*overrides):
  """Compiled `(params, batch) -> what the encoders make of it`."""
  method = toys.method("sycoca", *overrides)

  def parts(params, batch):
    apply = functools.partial(method.apply, params)
    embedded = apply("embed_patches", batch["image"])
    cls, patches = apply("see", embedded)
    _, tokens = apply("read", batch["text"], batch["text_len"])
    return dict(
      embedded=embedded,
      cls=cls,
      patches=patches,
      tokens=tokens,
      context=apply("pool", cls, patches)[1],
      patch_parts=apply("patch_parts", patches),
      token_embeddings=apply("token_embeddings", tokens),
    )

  return toys.jit(parts)


def _seen(batch, overrides=()):
  params = toys.params("sycoca", *overrides)
  return jax.device_get(_parts(*overrides)(params, batch))


@functools.cache
def _ranking(*overrides):
  """Compiled `(batch, what encoders make of it, step, seed) -> ranking`."""
  method, params = toys.method("sycoca", *overrides), toys.params("sycoca")

  def rank(batch, seen, step, seed):
    parts = (seen[name] for name in ("patches", "context", "tokens"))
    return method._rank(params, batch, *parts, toys.context(step, seed))

  return toys.jit(rank)


def _order(batch, overrides=(), step=0, seed=0):
  """The method's ranking."""
  return np.asarray(_ranking(*overrides)(batch, _seen(batch), step, seed))


def _relevance(patches, tokens, text_len):
  """Each patch's best token, by loops; neither pads nor the start symbol."""
  scores = np.empty(patches.shape[:2])
  for i, n in np.ndindex(*scores.shape):
    words = [tokens[i, t] @ patches[i, n] for t in range(1, text_len[i])]
    scores[i, n] = max(words)
  return scores


def _joint_scores(batch, overrides=()):
  seen = _seen(batch, overrides)
  patches = seen["patch_parts"].astype(np.float64)
  tokens = seen["token_embeddings"].astype(np.float64)
  if set(toys.CLS) <= set(overrides):  # else parts of a sum, of any length
    np.testing.assert_allclose(np.linalg.norm(patches, axis=-1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), 1, rtol=1e-5)
  return _relevance(patches, tokens, batch["text_len"])


# --- The whole, and its parts -----------------------------------------------


@pytest.mark.parametrize(
  "overrides",
  [
    (),
    (TOKENS, "method.target=pixels", "method.distance=l1", SHARED),
    ("method.r_h=0.75", "method.r_l=0.2", *toys.CLS),
  ],
  ids=str,
)
def test_numpy(overrides):
  """All terms, from the module's parts and a ranking in NumPy."""
  batch = toys.batch(6)
  method = toys.method("sycoca", *overrides)
  params = toys.params("sycoca", *overrides)
  order = np.argsort(-_joint_scores(batch, overrides)).astype(np.int32)
  losses = toys.losses("sycoca", *overrides)
  total, (terms, _) = losses(params, batch, toys.context())
  # Captioning sees the patches that rank highest; TG-MIM hides them.
  kept = order[:, : PATCHES - round(method.r_l * PATCHES)]
  number = round(method.r_h * PATCHES)
  hidden, visible = order[:, :number], order[:, number:]

  @toys.jit
  def decode(params, seen):
    apply = functools.partial(method.apply, params)
    rows = np.arange(6)[:, None]
    _, context = apply("pool", seen["cls"], seen["patches"][rows, kept])
    written = apply("write", seen["tokens"][:, :-1], context)
    if method.mask_stage == "tokens":
      x = seen["patches"][rows, visible]
    else:
      x = apply("see", seen["embedded"][rows, visible])[1]
    drawn = apply("draw", x, order, seen["tokens"], batch["text_len"])
    return apply("logits", written), drawn

  logits, prediction = jax.device_get(decode(params, _seen(batch, overrides)))
  nll = count = 0.0
  for i, length in enumerate(batch["text_len"]):
    for t in range(1, length):
      row = logits[i, t - 1].astype(np.float64)
      nll += np.log(np.exp(row).sum()) - row[batch["text"][i, t]]
      count += 1
  np.testing.assert_allclose(terms["caption"], nll / count, rtol=1e-5)

  normal = (batch["image"] / 255 - patches_lib.MEAN) / patches_lib.STD
  error = []
  for i in range(6):
    for n, patch in zip(hidden[i], prediction[i], strict=True):
      r, c = divmod(n, 3)
      target = normal[i, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].reshape(-1)
      if method.target == "normalized":
        target = target - target.mean()
        variance = (target**2).sum() / (len(target) - 1)
        target = target / np.sqrt(variance + 1e-6)
      difference = np.abs(patch - target)
      error.append(np.mean(difference ** (1 + (method.distance == "l2"))))
  np.testing.assert_allclose(terms["tgmim"], np.mean(error), rtol=1e-5)
  expected = terms["itc"] + 2 * terms["caption"] + terms["tgmim"]
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  # The contrastive loss is CoCa's, of the whole picture.
  plain = tuple(o for o in overrides if not o.startswith("method."))
  coca = {k: params[k] for k in toys.params("coca", *plain)}
  _, (terms_2, _) = toys.losses("coca", *plain)(coca, batch, toys.context())
  np.testing.assert_allclose(terms["itc"], terms_2["itc"], rtol=1e-5)


def _steps(name, *overrides, count=3):
  """Parameters, their average, gradients and metrics after each update."""
  overrides = ("optimizer.grad_clip=0.1", *overrides)
  config, method = toys.config(name, *overrides), toys.method(name, *overrides)
  inner, _ = optim.make_optimizer(config, 10, 2)
  optimizer = skips.skip_nonfinite(optax.chain(toys.record_gradients(), inner))

  def create():
    spec = train_state.batch_spec(config)
    return train_state.create(method, optimizer, spec, seed=0, use_ema=True)

  step = toys.jit(
    train_step.make_train_step(
      method,
      optimizer,
      accumulate=config.accumulate,
      mesh=sharding.make_mesh((1, 1, 1), jax.devices()[:1]),
      ema_decay=0.9,
    )
  )
  state = toys.jit(create)()
  seen = [(state.params, state.ema_params, state.params, {})]
  for i in range(count):
    batch = toys.batch(8, seed=i)
    del batch["index"]
    state, metrics = step(state, batch)
    gradients = state.opt_state.inner[0]
    seen.append((state.params, state.ema_params, gradients, metrics))
  return jax.device_get(seen)


@pytest.mark.parametrize(
  "overrides",
  [
    ("optimizer.name=adamw",),
    pytest.param(("optimizer.name=muon",), marks=pytest.mark.slow),
    pytest.param(("accumulate=4",), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_without_its_additions_it_is_coca_bit_for_bit(overrides):
  """Parameters at the start, losses, gradients, and full updates."""
  off = ("method.tgmim_weight=0", "method.r_l=0")
  coca, same = _steps("coca", *overrides), _steps("sycoca", *overrides, *off)
  for step, (expected, actual) in enumerate(zip(coca, same, strict=True)):
    toys.assert_trees_equal(actual[-1], expected[-1])
    for mine, theirs in zip(actual[:-1], expected[:-1], strict=True):
      shared = {name: mine[name] for name in theirs}
      toys.assert_trees_equal(shared, theirs)
      assert mine.keys() - theirs.keys() == _ADDED
    if step:  # updates did happen, and not by the additions
      before = coca[step - 1][0]["decoder"]["norm"]["scale"]
      assert (before != expected[0]["decoder"]["norm"]["scale"]).any()
      added = {name: actual[2][name] for name in _ADDED}
      assert not any(np.any(leaf) for leaf in jax.tree.leaves(added))


_ADDED = {"decoder_input", "image_decoder", "pixels"}


def test_a_captioner_that_sees_all_patches_is_cocas():
  """Only r_l = 0: the captioning loss, too, must be the same number."""
  batch, params = toys.batch(), toys.params("sycoca")
  losses = toys.losses("sycoca", "method.r_l=0")
  _, (terms, _) = losses(params, batch, toys.context())
  _, (masked, _) = toys.losses("sycoca")(params, batch, toys.context())
  coca = {name: params[name] for name in toys.params("coca")}
  _, (expected, _) = toys.losses("coca")(coca, batch, toys.context())
  np.testing.assert_allclose(terms["caption"], expected["caption"], rtol=1e-6)
  assert abs(masked["caption"] - expected["caption"]) > 1e-4


# --- The ranking ------------------------------------------------------------


def test_scores():
  batch = toys.batch(6)
  joint = _joint_scores(batch)
  np.testing.assert_array_equal(_order(batch), np.argsort(-joint))
  reverse = _order(batch, ("method.score=reverse",))
  np.testing.assert_array_equal(reverse, np.argsort(joint))
  seen = _seen(batch)
  raw = _relevance(seen["context"], seen["tokens"], batch["text_len"])
  order = _order(batch, ("method.score=raw",))
  np.testing.assert_array_equal(order, np.argsort(-raw))
  assert (order != _order(batch)).any()


def test_kept_and_hidden_patches_partition_the_picture():
  for score in sycoca.SCORES:
    order = _order(toys.batch(6), (f"method.score={score}",))
    hidden = masking.scatter_mask(order[:, :HIDDEN], PATCHES)
    visible = masking.scatter_mask(order[:, HIDDEN:], PATCHES)
    np.testing.assert_array_equal(hidden, ~visible)
    assert (hidden.sum(axis=1) == HIDDEN).all()


def test_scores_carry_no_gradient():
  draw = np.random.default_rng(0).normal
  patches = draw(size=(2, PATCHES, 5)).astype(np.float32)
  tokens = draw(size=(2, LENGTH, 5)).astype(np.float32)
  text_len = np.array([LENGTH, 4])
  scores, pull = jax.vjp(
    lambda p, t: sycoca.relevance(p, t, text_len), patches, tokens
  )
  np.testing.assert_allclose(
    scores, _relevance(patches, tokens, text_len), rtol=1e-5
  )
  for gradient in pull(jnp.ones_like(scores)):
    assert not gradient.any()


def test_padding_does_not_rank():
  """Nor its length, nor what stands in it."""
  batch = toys.batch(6)
  batch["text_len"] = np.minimum(batch["text_len"], 6)
  expected = _order(batch)
  cut = batch | {"text": batch["text"][:, :6]}
  np.testing.assert_array_equal(_order(cut), expected)
  pads = np.arange(LENGTH) >= batch["text_len"][:, None]
  text = np.where(pads, 17, batch["text"]).astype(np.int32)
  np.testing.assert_array_equal(_order(batch | {"text": text}), expected)
  text = np.where(pads, batch["text"], 17).astype(np.int32)
  assert (_order(batch | {"text": text}) != expected).any()


def test_rankings_follow_their_examples():
  batch = toys.batch(6)
  order = np.array([3, 0, 5, 1, 4, 2])
  moved = {name: value[order] for name, value in batch.items()}
  for score in ("joint", "random"):
    overrides = (f"method.score={score}",)
    expected = _order(batch, overrides)[order]
    np.testing.assert_array_equal(_order(moved, overrides), expected)
    # And do not see who else is in the chunk.
    chunk = {name: value[2:4] for name, value in batch.items()}
    expected = _order(batch, overrides)[2:4]
    np.testing.assert_array_equal(_order(chunk, overrides), expected)


def test_random_rankings_follow_the_key_and_the_step():
  overrides, batch = ("method.score=random",), toys.batch(6)
  order = _order(batch, overrides)
  np.testing.assert_array_equal(_order(batch, overrides), order)
  assert (_order(batch, overrides, step=1) != order).any(axis=1).all()
  assert (_order(batch, overrides, seed=1) != order).any(axis=1).all()
  # The picture and the caption do not matter.
  other = toys.batch(6, seed=5)
  np.testing.assert_array_equal(_order(other, overrides), order)


def test_attentive_start_step():
  batch = toys.batch(6)
  late = ("method.attentive_start_step=3",)
  for step in range(5):
    score = "random" if step < 3 else "joint"
    expected = _order(batch, (f"method.score={score}",), step)
    np.testing.assert_array_equal(_order(batch, late, step), expected)


# --- Rebuilding -------------------------------------------------------------


@functools.cache
def _rebuild(*overrides):
  """Compiled `(params, batch, order) -> predictions of the hidden patches`."""
  method = toys.method("sycoca", *overrides)

  def rebuild(params, batch, order):
    embedded = method.apply(params, "embed_patches", batch["image"])
    _, patches = method.apply(params, "see", embedded)
    _, tokens = method.apply(params, "read", batch["text"], batch["text_len"])
    return method._reconstruct(params, batch, embedded, patches, tokens, order)[
      0
    ]

  return toys.jit(rebuild)


def _fixed_order(size):
  """Each picture hides other patches; the mask is held fixed."""
  draw = np.random.default_rng(2)
  return np.array([draw.permutation(PATCHES) for _ in range(size)], np.int32)


def _repaint(batch, order):
  """Changes the pixels of the named patches."""
  image = batch["image"].copy()
  for i, row in enumerate(order):
    for n in row:
      r, c = divmod(n, 3)
      place = (
        slice(r * PATCH, (r + 1) * PATCH),
        slice(c * PATCH, (c + 1) * PATCH),
      )
      image[i][place] = 255 - image[i][place]
  return batch | {"image": image}


@pytest.mark.parametrize("stage", sycoca.MASK_STAGES)
def test_hidden_pixels(stage):
  """At the input, they cannot leak. Of `tokens` it is known that they do."""
  overrides = (f"method.mask_stage={stage}",)
  batch, order = toys.batch(), _fixed_order(4)
  rebuild = functools.partial(
    _rebuild(*overrides), toys.params("sycoca", *overrides)
  )
  prediction = rebuild(batch, order)
  assert prediction.shape == (4, HIDDEN, 3 * PATCH**2)
  hidden = rebuild(_repaint(batch, order[:, :HIDDEN]), order)
  change = np.abs(hidden - prediction).max(axis=(1, 2))
  assert (change == 0).all() if stage == "input" else (change > 1e-4).all()
  visible = rebuild(_repaint(batch, order[:, HIDDEN:]), order)
  assert (np.abs(visible - prediction).max(axis=(1, 2)) > 1e-4).all()


@pytest.mark.parametrize("decoders", sycoca.DECODERS)
@pytest.mark.parametrize("guided", ["true", "false"])
def test_the_caption_guides(guided, decoders):
  overrides = (f"method.text_guided={guided}", f"method.decoders={decoders}")
  batch, order = toys.batch(), _fixed_order(4)
  rebuild = functools.partial(
    _rebuild(*overrides), toys.params("sycoca", *overrides)
  )
  swap = [1, 2, 3, 0]
  swapped = {name: batch[name][swap] for name in ("text", "text_len")}
  change = np.abs(rebuild(batch | swapped, order) - rebuild(batch, order))
  if guided == "true":
    assert (change.max(axis=(1, 2)) > 1e-4).all()
    # Padding is no guide.
    pads = np.arange(LENGTH) >= batch["text_len"][:, None]
    text = np.where(pads, 17, batch["text"]).astype(np.int32)
    np.testing.assert_array_equal(
      rebuild(batch | {"text": text}, order), rebuild(batch, order)
    )
  else:
    assert (change == 0).all()


def test_the_order_among_hidden_patches_does_not_matter():
  batch, order = toys.batch(), _fixed_order(4)
  shuffled = order.copy()
  shuffled[:, :HIDDEN] = order[:, :HIDDEN][:, ::-1]
  shuffled[:, HIDDEN:] = order[:, HIDDEN:][:, ::-1]
  params = toys.params("sycoca")
  expected = _rebuild()(params, batch, order)
  np.testing.assert_allclose(
    _rebuild()(params, batch, shuffled),
    expected[:, ::-1],
    rtol=1e-4,
    atol=1e-5,
  )


def _reached(gradient):
  """Which modules a gradient reaches."""
  return {
    name
    for name, branch in gradient.items()
    if any(np.any(leaf != 0) for leaf in jax.tree.leaves(branch))
  }


@functools.cache
def _term_gradients(*overrides):
  """Gradients of each of the method's own terms."""
  method = toys.method("sycoca", *overrides)

  def term(params, name):
    ctx = toys.context()
    mean = method.forward(params, toys.batch(), ctx).terms[name]
    return mean.total / mean.weight

  run = toys.jit(
    lambda params: {n: jax.grad(term)(params, n) for n in ("caption", "tgmim")}
  )
  return run(toys.params("sycoca", *overrides))


def test_separate_decoders():
  gradients = _term_gradients()
  towers = {"vision", "text"}
  assert _reached(gradients["caption"]) == towers | {
    "decoder",
    "vocabulary",
    "image_pool",
  }
  # Rebuilding teaches both towers, the text tower through its tokens.
  assert _reached(gradients["tgmim"]) == towers | {
    "decoder_input",
    "image_decoder",
    "pixels",
  }


def test_shared_decoders():
  gradients = _term_gradients(SHARED)
  for name in ("caption", "tgmim"):
    stream = gradients[name]["decoder"]["transformer"]["layers"]
    assert _reached(stream) == stream.keys()
  params, separate = toys.shapes("sycoca", SHARED), toys.shapes("sycoca")
  assert separate.keys() - params.keys() == {"image_decoder"}

  def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  stream = size(separate["image_decoder"])
  assert size(params) == size(separate) - stream < size(separate)


def test_a_term_of_weight_zero_is_not_computed():
  method = toys.method("sycoca", "method.tgmim_weight=0")
  assert method.term_weights(0) == {"itc": 1.0, "caption": 2.0}
  terms = jax.eval_shape(
    lambda p: method.forward(p, toys.batch(), toys.context()).terms,
    toys.params("sycoca"),
  )
  assert terms.keys() == {"caption"}
  weights = toys.method("sycoca", "method.tgmim_weight=0.5").term_weights(0)
  assert weights == {"itc": 1.0, "caption": 2.0, "tgmim": 0.5}


@pytest.mark.parametrize("target", ["normalized", "pixels"])
def test_reconstruct(target):
  # It ranks by the caption, however long that was random in training.
  overrides = (f"method.target={target}", "method.attentive_start_step=1000")
  method, batch = toys.method("sycoca", *overrides), toys.batch()
  params = toys.params("sycoca", *overrides)
  out = toys.jit(method.reconstruct)(params, batch, jax.random.key(0))
  order = _order(batch)
  np.testing.assert_array_equal(
    out["mask"], masking.scatter_mask(order[:, :HIDDEN], PATCHES)
  )
  prediction = np.asarray(_rebuild()(params, batch, order))
  for i, n in np.ndindex(4, PATCHES):
    r, c = divmod(n, 3)
    place = (i, slice(8 * r, 8 * r + 8), slice(8 * c, 8 * c + 8))
    true = batch["image"][place]
    if not out["mask"][i, n]:
      np.testing.assert_array_equal(out["masked"][place], true)
      np.testing.assert_array_equal(out["prediction"][place], true)
      continue
    grey = np.round(255 * np.array(patches_lib.MEAN))
    assert (out["masked"][place] == grey).all()
    pixels = prediction[i, list(order[i]).index(n)].reshape(8, 8, 3)
    if target == "normalized":
      normal = (true / 255 - patches_lib.MEAN) / patches_lib.STD
      pixels = pixels * normal.std(ddof=1) + normal.mean()
    shown = (pixels * patches_lib.STD + patches_lib.MEAN) * 255
    difference = out["prediction"][place] - np.clip(shown, 0, 255)
    assert np.abs(difference).max() < 0.51  # it is rounded


# --- Mistakes ---------------------------------------------------------------


@pytest.mark.parametrize(
  "overrides, says",
  [
    (("method.score=cosine",), "score is 'cosine', not one of joint, raw, "),
    (("method.mask_stage=output",), "'output', not one of input, tokens"),
    (("method.target=rgb",), "'rgb', not one of normalized, pixels"),
    (("method.distance=l3",), "'l3', not one of l2, l1"),
    (("method.itc_reduction=max",), "'max', not one of mean, sum"),
    (("method.decoders=one",), "'one', not one of separate, shared"),
    (("method.r_h=1",), "r_h=1.0 hides all or none of the 9 patches"),
    (("method.r_h=0.01",), "r_h=0.01 hides all or none of the 9 patches"),
    (("method.r_l=1",), "r_l=1.0 leaves captioning none of the 9 patches"),
    (("method.r_l=-0.5",), "r_l=-0.5 leaves captioning none"),
    (
      ("method.score=raw", "model.vision.width=32"),
      "score=raw compares .* towers of equal width",
    ),
    (
      (
        "method.score=raw",
        "model.pooler.kind=cascade",
        "model.pooler.num_queries=2",
      ),
      "score=raw compares .*kind=cls or attention",
    ),
    (
      ("model.image_decoder.width=18",),
      "image_decoder.width=18 .*multiple of 4",
    ),
    (("model.image_decoder.num_heads=3",), "3 heads do not divide"),
  ],
  ids=str,
)
def test_what_cannot_be_built(overrides, says):
  with pytest.raises(UserError, match=says) as error:
    toys.method("sycoca", *overrides)
  assert "\n" not in str(error.value)


def test_no_hidden_patches_are_needed_where_none_are_rebuilt():
  toys.method("sycoca", "method.r_h=0", "method.tgmim_weight=0")
