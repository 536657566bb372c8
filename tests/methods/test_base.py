"""What methods share: finding them, weighted means, read-outs, scores."""

import jax
import numpy as np
import pytest

from tests import toys
from tests.toys import LENGTH, PATCH, VOCAB
from vlp_jax.errors import UserError
from vlp_jax.methods import base
from vlp_jax.methods.base import Mean

METHODS = ("clip", "coca", "sycoca")


def test_methods_are_found_by_their_file():
  assert {*METHODS} <= {*base.available()}
  assert not {"base", "_towers"} & {*base.available()}
  with pytest.raises(UserError, match=r"'flamingo', but .* coca, scl, simla"):
    base.get("flamingo", None)


def test_mean():
  values = np.array([[1, 2], [3, 4]], np.int32)
  assert Mean.of(values) == (10, 4)
  mean = Mean.of(values, np.array([[1, 0], [0.5, 0]], np.float32))
  assert mean == (2.5, 1.5)
  assert mean.total.dtype == np.float32


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_static(name):
  """Equal configs make equal, hashable methods: one compilation for both."""
  a, b = (base.get(name, toys.config(name)) for _ in range(2))
  assert a == b and hash(a) == hash(b)
  other = base.get(name, toys.config(name, "model.activation=gelu"))
  assert a != other


@pytest.mark.parametrize("name", METHODS)
def test_the_temperature_is_clamped(name):
  params, method = toys.params(name), toys.method(name)
  for value, expected in ((-1.0, 0.0), (3.0, 3.0), (9.0, np.log(100))):
    temperature = params["temperature"] | {"logit_scale": np.float32(value)}
    moved = method.project(params | {"temperature": temperature})
    got = moved["temperature"].pop("logit_scale")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    del temperature["logit_scale"]
    rest = {k: v for k, v in params.items() if k != "temperature"}
    toys.assert_trees_equal(moved, rest | {"temperature": temperature})


@pytest.mark.parametrize("name", METHODS)
def test_parameters_do_not_depend_on_the_batch(name):
  method, config = toys.method(name), toys.config(name)
  spec = {k: jax.eval_shape(lambda x=v: x) for k, v in toys.batch(2).items()}
  shapes, state = jax.eval_shape(method.init, jax.random.key(0), spec)
  assert state == {}
  expected = toys.shapes(name)
  assert jax.tree.structure(shapes) == jax.tree.structure(expected)
  assert shapes == expected
  assert config.batch_size != 2


def test_caption_score():
  batch, params = toys.batch(), toys.params("coca")
  score = toys.jit(toys.method("coca").caption_score)(params, batch)
  args = (batch["image"], batch["text"], batch["text_len"])
  logits = toys.module_call("coca", (), "caption_logits")(params, *args)
  for i, length in enumerate(batch["text_len"]):
    total = 0.0
    for t in range(1, length):
      row = np.asarray(logits[i, t - 1], np.float64)
      total += row[batch["text"][i, t]] - np.log(np.exp(row).sum())
    np.testing.assert_allclose(score[i], total / (length - 1), rtol=1e-5)
  assert score.shape == (4,)


def test_padding_counts_for_nothing():
  """Neither its length, nor what stands in it."""
  batch, params = toys.batch(), toys.params("coca")
  short = batch | {"text_len": np.minimum(batch["text_len"], 6)}
  score = toys.jit(toys.method("coca").caption_score)
  expected = score(params, short)
  cut = score(params, short | {"text": batch["text"][:, :6]})
  np.testing.assert_allclose(cut, expected, rtol=1e-5)
  pads = np.arange(LENGTH) >= short["text_len"][:, None]
  noise = np.random.default_rng(9).integers(4, VOCAB, batch["text"].shape)
  text = np.where(pads, noise, batch["text"]).astype(np.int32)
  np.testing.assert_array_equal(score(params, short | {"text": text}), expected)
  assert pads.any()


def test_readouts():
  def of(name, *overrides):
    return toys.method(name, *overrides).readouts

  openclip = (
    "model.pooler.kind=openclip",
    "model.pooler.num_queries=3",
    "model.vision.cls_token=true",
  )
  assert of("clip") == ("contribution", "cosine")
  assert of("clip", *toys.CLS) == ("cosine",)
  assert of("coca") == ("contribution", "cosine", "cross_attention")
  assert of("coca", *toys.CLS) == ("cosine", "cross_attention")
  assert of("coca", *openclip) == ("cosine",)


def _map(readout, batch, token_mask=None):
  method, params = toys.method("coca"), toys.params("coca")
  run = toys.jit(method.patch_text_map, static_argnums=2)
  return np.asarray(run(params, batch, readout, token_mask))


def test_contributions_and_cosines():
  batch, params = toys.batch(), toys.params("coca")
  args = (batch["image"], batch["text"], batch["text_len"])
  for readout, function in (
    ("contribution", "patch_contributions"),
    ("cosine", "patch_cosines"),
  ):
    values = toys.module_call("coca", (), function)(params, *args)
    np.testing.assert_allclose(
      _map(readout, batch), values.reshape(4, 3, 3), rtol=1e-4, atol=1e-6
    )
  patches = toys.module_call("coca", (), "embed_patches")(params, args[0])
  patches = toys.module_call("coca", (), "see")(params, patches)[1]
  patches = toys.module_call("coca", (), "patch_embeddings")(params, patches)
  text = toys.module_call("coca", (), "encode_text")(params, *args[1:])
  expected = np.einsum("bne,be->bn", patches, text).reshape(4, 3, 3)
  np.testing.assert_allclose(
    _map("cosine", batch), expected, rtol=1e-4, atol=1e-5
  )


def test_cross_attention_is_averaged_over_the_tokens_that_it_writes():
  batch = toys.batch()
  whole = _map("cross_attention", batch)
  np.testing.assert_allclose(whole.sum((1, 2)), 1, rtol=1e-5)
  assert whole.min() > 0
  # The mean over all tokens is that of the maps of single tokens.
  single = []
  for t in range(LENGTH):
    mask = np.broadcast_to(np.arange(LENGTH) == t, (4, LENGTH))
    single.append(_map("cross_attention", batch, mask))
  real = (np.arange(LENGTH) < batch["text_len"][:, None]).T[..., None, None]
  real[0] = False  # nothing writes the start symbol
  total = (np.array(single) * real).sum(0) / real.sum(0)
  np.testing.assert_allclose(whole, total, rtol=1e-4)
  assert (np.array(single)[~real[..., 0, 0]] == 0).all()
  # The row that writes token t has not read token t.
  text = batch["text"].copy()
  text[:, 2] = (text[:, 2] + 1) % VOCAB
  mask = np.broadcast_to(np.arange(LENGTH) == 2, (4, LENGTH))
  moved = _map("cross_attention", batch | {"text": text}, mask)
  np.testing.assert_array_equal(moved, single[2])
  mask = np.broadcast_to(np.arange(LENGTH) == 3, (4, LENGTH))
  moved = _map("cross_attention", batch | {"text": text}, mask)
  seen = batch["text_len"] > 3
  assert np.abs(moved - single[3])[seen].max() > 1e-5


def test_maps_follow_the_picture():
  """Swapping two patches of the picture with their positions swaps the map."""
  params = dict(toys.params("coca"))
  vision = dict(params["vision"])
  vision["pos"] = np.zeros_like(vision["pos"])  # patches know no place
  params["vision"] = vision
  batch = toys.batch()
  image = batch["image"].copy()
  image[:, :PATCH, :PATCH] = batch["image"][:, PATCH : 2 * PATCH, -PATCH:]
  image[:, PATCH : 2 * PATCH, -PATCH:] = batch["image"][:, :PATCH, :PATCH]
  run = toys.jit(toys.method("coca").patch_text_map, static_argnums=2)
  for readout in toys.method("coca").readouts:
    before = np.array(run(params, batch, readout))
    after = run(params, batch | {"image": image}, readout)
    assert before.shape == (4, 3, 3)
    before[:, [0, 1], [0, 2]] = before[:, [1, 0], [2, 0]]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
