"""What reranking costs, and that it finds what brute force does."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import rerank_cost
from tests import toys
from tests.evaluators import fakes
from vlp_jax.evaluators import reranking

SMALL = ("model.fusion.depth=1",)


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_rows_are_those_that_the_evaluator_runs(gap):
  image, text = rerank_cost.embeddings(20, 60, gap)
  got = rerank_cost.calls(image, text, k=5, batch_size=8)
  cosine = image @ text.T
  wanted = np.zeros(cosine.shape, bool)
  for i, row in enumerate(cosine):
    wanted[i, np.argsort(-row)[:5]] = True
  for j, column in enumerate(cosine.T):
    wanted[np.argsort(-column)[:5], j] = True
  count = np.sort(wanted.sum(axis=1))[::-1]
  tile = reranking.Evaluator.tile
  pairs = sum(-(-count[b] // tile) * tile * 8 for b in (0, 8, 16))
  assert got == {
    "encode_image": 24,
    "encode_text": 64,
    "match_state": 24,
    "match_score": pairs,
  }
  most = rerank_cost.most(20, 60, k=5, batch_size=8)
  assert all(got[name] <= most[name] for name in got | most)


def test_pieces_add_up():
  gflop = rerank_cost.pieces("tiny", 64)
  both = gflop["fuse"] + gflop["encode_text"]
  np.testing.assert_allclose(gflop["match_score"], both, rtol=0.02)
  np.testing.assert_allclose(
    gflop["every_pair"], gflop["match_state"] + gflop["match_score"], rtol=0.02
  )
  counts = {"some": {"encode_text": 3, "match_score": 5}}
  found = rerank_cost.operations(gflop, counts)["reranking, some"]
  expected = 3 * gflop["encode_text"] + 5 * gflop["match_score"]
  assert found == pytest.approx(1e9 * expected)


def test_all_candidates_find_what_brute_force_finds(monkeypatch):
  """SCL's own scores, with weights drawn at random; and once more by hand."""
  options = toys.compiler_options()
  fast = functools.partial(jax.jit, compiler_options=options)
  monkeypatch.setattr(jax, "jit", fast)
  draw = np.random.default_rng(0)
  size, side = 9, fakes.IMAGE_SIZE
  pixels = draw.integers(0, 256, (size, side, side, 3), dtype=np.uint8)
  records = fakes.records([[f"text {i}"] for i in range(size)])
  for record, picture in zip(records, pixels, strict=True):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    record["image"] = file.getvalue()
  texts = [record["captions"][0] for record in records]
  tokenizer = fakes.Tokenizer(texts)
  env = fakes.environment(records, tokenizer)
  method = toys.method("scl", *SMALL)
  params = jax.tree.map(jnp.asarray, toys.params("scl", *SMALL))
  found = rerank_cost.recalls(method, params, env, pictures=size, k=3)

  @jax.jit
  def score(image, text, text_len):
    seen = method.apply(params, "see", method.apply(params, "embed", image))
    tokens = method.apply(params, "read", text, text_len)
    fused = method.apply(params, "fuse", tokens, text_len, seen)
    return method.apply(params, "match_logits", *fused) @ np.float32([-1, 1])

  ids, length = tokenizer.encode_batch(texts, fakes.MAX_LEN)
  rows, columns = np.divmod(np.arange(size**2), size)
  scores = score(pixels[rows], ids[columns], length[columns])
  scores = np.asarray(scores).reshape(size, size)
  for way, x in (("i2t", scores), ("t2i", scores.T)):
    rank = (x > np.diag(x)[:, None]).sum(axis=1)
    for k in (1, 5):
      assert found["every pair"][f"{way}_r{k}"] == np.mean(rank < k), (way, k)
  assert found["k=all"] == found["every pair"]
  assert found["k=3"] != found["every pair"]
