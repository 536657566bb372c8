"""CoCa against NumPy; padding, order and chunks change nothing."""

import numpy as np
import pytest

from tests import toys
from tests.toys import LENGTH, VOCAB
from vlp_jax.errors import UserError

KINDS = {
  "attention": (),
  "cls": (*toys.CLS, "method.itc_reduction=sum"),
  "cascade": ("model.pooler.kind=cascade", "model.pooler.num_queries=3"),
}


def _losses(params, batch, *overrides):
  total, (terms, report) = toys.losses("coca", *overrides)(
    params, batch, toys.context()
  )
  return total, terms, report


def _numpy(params, batch, overrides, factor):
  """Equations 2 to 4 on the module's embeddings and logits."""

  def call(function, *names):
    run = toys.module_call("coca", overrides, function)
    return np.asarray(run(params, *(batch[n] for n in names)), np.float64)

  image, text = call("encode_image", "image"), call("encode_text", *_TEXT)
  logits = 5 * image @ text.T
  same = batch["image_id"][:, None] == batch["image_id"]
  logits[same & ~np.eye(len(image), dtype=bool)] = -np.inf
  itc = 0.0
  for axis in (0, 1):
    itc += np.mean(np.log(np.exp(logits).sum(axis)) - np.diagonal(logits))
  logits, total, count, right = call("caption_logits", "image", *_TEXT), 0, 0, 0
  for i, length in enumerate(batch["text_len"]):
    for t in range(1, length):
      row, label = logits[i, t - 1], batch["text"][i, t]
      total += np.log(np.exp(row).sum()) - row[label]
      right += row.argmax() == label
      count += 1
  return factor * itc, total / count, right / count


_TEXT = ("text", "text_len")


@pytest.mark.parametrize("kind", KINDS)
def test_numpy(kind):
  overrides, batch = KINDS[kind], toys.batch(6)
  params = toys.params("coca", *overrides)
  total, terms, report = _losses(params, batch, *overrides)
  factor = 1.0 if kind == "cls" else 0.5
  itc, caption, accuracy = _numpy(params, batch, overrides, factor)
  np.testing.assert_allclose(terms["itc"], itc, rtol=1e-5)
  np.testing.assert_allclose(terms["caption"], caption, rtol=1e-5)
  np.testing.assert_allclose(total, itc + 2 * caption, rtol=1e-5)
  np.testing.assert_allclose(report["token_accuracy"], accuracy, rtol=1e-5)


def test_padding_counts_for_nothing():
  params, batch = toys.params("coca"), toys.batch()
  batch["text_len"] = np.minimum(batch["text_len"], 6)
  expected = _losses(params, batch)[0]
  pads = np.arange(LENGTH) >= batch["text_len"][:, None]
  noise = np.random.default_rng(9).integers(4, VOCAB, batch["text"].shape)
  text = np.where(pads, noise, batch["text"]).astype(np.int32)
  assert _losses(params, batch | {"text": text})[0] == expected
  cut = _losses(params, batch | {"text": batch["text"][:, :6]})[0]
  np.testing.assert_allclose(cut, expected, rtol=1e-6)


def test_the_order_of_the_batch_does_not_matter():
  params, batch = toys.params("coca"), toys.batch()
  order = np.array([2, 0, 3, 1])
  moved = {name: value[order] for name, value in batch.items()}
  _, terms, _ = _losses(params, batch)
  _, terms_2, _ = _losses(params, moved)
  for name, value in terms.items():
    np.testing.assert_allclose(terms_2[name], value, rtol=1e-6)


def test_chunks_of_the_vocabulary_change_nothing():
  params, batch = toys.params("coca"), toys.batch()
  args = (params, batch, toys.context())
  expected, (terms, _) = toys.gradients("coca")(*args)
  chunk = "method.caption_chunk=4"  # does not divide the 9 positions
  actual, (terms_2, _) = toys.gradients("coca", chunk)(*args)
  for name, value in terms.items():
    np.testing.assert_allclose(terms_2[name], value, rtol=1e-6)
  toys.assert_gradients_close(actual, expected)


def test_weights():
  method = toys.method(
    "coca", "method.itc_weight=0.5", "method.caption_weight=3"
  )
  assert method.term_weights(0) == {"itc": 0.5, "caption": 3.0}
  assert toys.method("coca").term_weights(0) == {"itc": 1.0, "caption": 2.0}


@pytest.mark.parametrize(
  "override, says",
  [
    (
      "method.itc_reduction=max",
      "itc_reduction is 'max', not one of mean, sum",
    ),
    ("model.decoder.width=32", "decoder.width=32 must equal .*text.width=16"),
    ("model.decoder.num_heads=3", "3 heads do not divide a width of 16"),
  ],
)
def test_what_cannot_be_built(override, says):
  with pytest.raises(UserError, match=says):
    toys.method("coca", override)
