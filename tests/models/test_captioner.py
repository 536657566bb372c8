"""Towers and decoder together: shapes, causality, generation."""

import functools

import jax
import numpy as np
import pytest

from tests import toys
from tests.models import reference
from tests.toys import BOS, EOS, LENGTH, VOCAB
from vlp_jax.models.captioner import unit

KINDS = {
  "attention": (),
  "cls": toys.CLS,
  "cascade": ("model.pooler.kind=cascade", "model.pooler.num_queries=3"),
}


def _call(overrides, function, *args):
  params = toys.params("coca", *overrides)
  return toys.module_call("coca", overrides, function)(params, *args)


def test_unit():
  x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
  np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings(kind):
  batch = toys.batch()
  image = _call(KINDS[kind], "encode_image", batch["image"])
  assert (image.shape, image.dtype) == ((4, 12), np.float32)
  np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-6)
  assert np.abs(image @ image.T - np.eye(4)).max() < 0.9999  # all differ


@pytest.mark.parametrize("kind", ["attention", "cls"])
def test_another_resolution(kind):
  batch = toys.batch(image_size=40)
  image = _call(KINDS[kind], "encode_image", batch["image"])
  np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-6)
  expected = _call(KINDS[kind], "encode_image", toys.batch()["image"])
  assert np.abs(image - expected).max() > 1e-3


def test_caption_logits_numpy():
  """The decoder reads the raw text tokens, and the picture's context."""
  batch, params = toys.batch(), toys.params("coca")
  logits = _call(
    (), "caption_logits", batch["image"], batch["text"], batch["text_len"]
  )
  assert (logits.shape, logits.dtype) == ((4, LENGTH - 1, VOCAB), np.float32)
  patches = _call((), "embed_patches", batch["image"])
  patches = _call((), "see", patches)[1]
  tokens = _call((), "read", batch["text"], batch["text_len"])[1]
  causal = np.tril(np.ones((LENGTH - 1,) * 2, bool))
  for i in range(4):
    context = reference.layer_norm(params["image_pool"]["norm"], patches[i])
    x = reference.transformer(
      params["decoder"]["transformer"],
      np.asarray(tokens[i, :-1], np.float64),
      causal,
      context,
      activation="relu2",
    )
    x = reference.layer_norm(params["decoder"]["norm"], x)
    expected = x @ params["vocabulary"]["kernel"]
    np.testing.assert_allclose(logits[i], expected, rtol=1e-4, atol=1e-4)


def test_captions_do_not_see_what_they_predict():
  """Changing token t moves no logits of the tokens up to t."""
  batch = toys.batch()
  full = np.full_like(batch["text_len"], LENGTH)
  logits = _call((), "caption_logits", batch["image"], batch["text"], full)
  for t in range(1, LENGTH):
    text = batch["text"].copy()
    text[:, t] = (text[:, t] + 1) % VOCAB
    moved = _call((), "caption_logits", batch["image"], text, full)
    np.testing.assert_array_equal(moved[:, :t], logits[:, :t])
    if t < LENGTH - 1:
      assert np.abs(moved[:, t:] - logits[:, t:]).max() > 1e-3


@functools.cache
def _generate(overrides):
  captioner = toys.method("coca", *overrides)
  return toys.jit(
    lambda params, image: captioner.generate(
      params, {"image": image}, LENGTH, BOS, EOS
    )
  )


def _without_a_cache(overrides, params, image):
  """Encodes the whole prefix for every token."""
  call = toys.module_call("coca", overrides, "caption_logits")
  text = np.zeros((len(image), LENGTH), np.int32)
  text[:, 0], done = BOS, np.zeros(len(image), bool)
  for t in range(1, LENGTH):
    length = np.full(len(image), LENGTH, np.int32)
    logits = np.array(call(params, image, text, length)[:, t - 1])
    logits[:, [0, BOS]] = -np.inf
    token = np.where(t == LENGTH - 1, EOS, logits.argmax(1))
    text[:, t] = np.where(done, 0, token)
    done |= text[:, t] == EOS
  return text


@pytest.mark.parametrize("kind", KINDS)
def test_generating_with_a_cache(kind):
  image = toys.batch(6)["image"]
  # So that captions differ, and end, and not all at the same place.
  seed = {"attention": 11, "cls": 0, "cascade": 0}[kind]
  params = toys.params("coca", *KINDS[kind], seed=seed)
  kernel = np.array(params["vocabulary"]["kernel"])
  kernel[:, EOS] *= 3
  params = params | {"vocabulary": {"kernel": kernel}}
  ids = _generate(KINDS[kind])(params, image)
  expected = _without_a_cache(KINDS[kind], params, image)
  np.testing.assert_array_equal(ids, expected)
  ends = np.argmax(expected == EOS, axis=1)
  assert len(np.unique(ends)) > 1 and ends.min() < LENGTH - 1
  assert len(np.unique(expected, axis=0)) > 1


def test_captions_beyond_the_positions_are_refused():
  captioner = toys.method("coca")
  with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens .*{LENGTH} pos"):
    jax.eval_shape(
      lambda params, image: captioner.generate(
        params, {"image": image}, LENGTH + 1, BOS, EOS
      ),
      toys.params("coca"),
      toys.batch()["image"],
    )
