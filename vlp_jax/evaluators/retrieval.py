"""Image-text retrieval: R@1/5/10 and median rank both ways over a whole split.

Protocol of zero-shot retrieval (CoCa, section 4.2.2): all pictures and all
captions are encoded once and ranked by cosine. Picture to text counts a hit
if any of the picture's captions is among the first k; in text to picture each
caption is a query. mTR and mIR are the means of the three recalls of picture
to text and of text to picture. Of clips ("video-text retrieval") all is the
same; there MedR, the median rank of the best right one, is told beside R@k (Yu
et al. 2018, JSFusion).

Ties get the recall expected when a tie is broken at random: a constant
embedding scores chance. A score that is not a number ranks below all others.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlp_jax.errors import UserError
from vlp_jax.evaluators import _batching, _truth, base

RECALLS = (1, 5, 10)
# Scores held at once: 64 MiB of float32, whatever the size of the split.
_MAX_SCORES = 2**24


class Evaluator(base.Evaluator):
  """`{i2t,t2i}_r{1,5,10}`, `mtr`, `mir`, each with its `_chance`.

  Likewise `{i2t,t2i}_median_rank`, counted from 1: less is better. With
  annotated pictures also `caption_true` and `image_true` (the share of first
  places whose caption is true of the picture), and for every recall and rank
  `<metric>_bag`: what comparing nothing but the sets of colours and shapes,
  and of a clip's motions, would score.

  Config field `captions`: 'first' pairs a picture with its caption [0] alone
  (on scenes the one that describes all objects), 'all' with each of them.
  """

  needs = ("encode_image", "encode_text")
  captioned = True
  fields = {"captions": "first"}  # noqa: RUF012

  def __init__(self, method, config, env):
    if config.captions not in ("first", "all"):
      raise UserError(
        f"{config.type}'s field captions is {config.captions!r}; it can be "
        "'first' or 'all'"
      )
    super().__init__(method, config, env)

  @functools.cached_property
  def _queries(self) -> tuple[list[str], np.ndarray]:
    """The captions, and for each the place of its picture."""
    count = 1 if self.config.captions == "first" else None
    chosen = [record["captions"][:count] for record in self.records]
    owner = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])
    return [caption for captions in chosen for caption in captions], owner

  @functools.cached_property
  def _meanings(self) -> list:
    return [self.source.language.parse(text) for text in self._queries[0]]

  def _true(self, text: int, picture: int) -> bool:
    """Tells whether a caption is true of a picture, both by place."""
    objects = self.records[picture]["objects"]
    return _truth.holds(self.source.language, self._meanings[text], objects)

  @functools.cached_property
  def _constants(self) -> dict[str, float]:
    """What does not depend on the method: chance levels and baselines."""
    texts, owner = self._queries
    count = len(self.records)
    own, one = np.bincount(owner, minlength=count), np.ones_like(owner)
    # All tied.
    chance = rank_metrics(
      (0 * own, len(texts) - own, own), (0 * one, count - one, one)
    )
    constants = {f"{name}_chance": v for name, v in chance.items()}
    if not self.source.annotated:
      return constants
    rate = _truth.moved_rate(self._true, owner)
    # A random first place is the right one once in N.
    rate += (1 - rate) / count
    constants |= {"caption_true_chance": rate, "image_true_chance": rate}
    objects = [record["objects"] for record in self.records]
    bags = _truth.bag_vectors(self.source.language, objects, texts)
    scores, _ = self._by_cosine(*bags)
    return constants | {f"{name}_bag": v for name, v in scores.items()}

  def run(self, params):
    metrics, (first_text, first_image) = self._rank(params)
    metrics |= self._constants
    if self.source.annotated:
      true = [self._true(text, i) for i, text in enumerate(first_text)]
      metrics["caption_true"] = float(np.mean(true))
      true = [self._true(i, picture) for i, picture in enumerate(first_image)]
      metrics["image_true"] = float(np.mean(true))
    return metrics

  def _rank(self, params):
    """Returns `rank_metrics`, and the first place of each query both ways."""
    texts, _ = self._queries
    image = self.encode_images(params)
    return self._by_cosine(image, self.encode_texts(params, texts))

  def _by_cosine(self, image: np.ndarray, text: np.ndarray):
    """Returns what `_rank` does, for embeddings `[N, E]` and `[M, E]`."""
    _, owner = self._queries
    pictures = np.arange(len(image))
    rank = functools.partial(rank_all, mesh=self.env.mesh)
    *i2t, first_text = rank(image, text, pictures, owner)
    *t2i, first_image = rank(text, image, owner, pictures)
    return rank_metrics(i2t, t2i), (first_text, first_image)


def rank_metrics(
  i2t: Sequence[np.ndarray], t2i: Sequence[np.ndarray]
) -> dict[str, float]:
  """Returns `{i2t,t2i}_r{1,5,10}`, `{i2t,t2i}_median_rank`, `mtr` and `mir`.

  Args:
    i2t: the arguments `above`, `tied` and `right` of `recall` for pictures
      that look for captions.
    t2i: for captions that look for pictures.
  """
  values = {}
  for way, mean, ranks in (("i2t", "mtr", i2t), ("t2i", "mir", t2i)):
    found = [float(recall(*ranks, k).mean()) for k in RECALLS]
    values |= {f"{way}_r{k}": v for k, v in zip(RECALLS, found, strict=True)}
    values[mean] = float(np.mean(found))
    values[f"{way}_median_rank"] = median_rank(*ranks)
  return values


def rank_all(
  queries: np.ndarray,
  keys: np.ndarray,
  query_owner: np.ndarray,
  key_owner: np.ndarray,
  *,
  mesh: Mesh,
  max_scores: int = _MAX_SCORES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Ranks keys for every query, a chunk of queries at a time.

  A key is right for a query if their owners are equal; what counts is the
  right key with the best score.

  Args:
    queries: float `[N, E]`.
    keys: float `[M, E]`.
    query_owner: int `[N]`.
    key_owner: int `[M]`; every query has at least one right key.
    mesh: the queries of a chunk are spread over it.
    max_scores: bound on chunk size times M.

  Returns:
    int `[N]` each: wrong keys above the best right one, wrong keys tied with
    it, right keys tied with it (itself included), and the first key of all.
  """
  counts = by_chunks(
    _compiled_ranks(mesh),
    {
      "queries": np.asarray(queries, np.float32),
      "owner": np.asarray(query_owner, np.int32),
    },
    {
      "keys": np.asarray(keys, np.float32),
      "owner": np.asarray(key_owner, np.int32),
    },
    mesh=mesh,
    max_scores=max_scores,
  )
  return tuple(counts.T)


def by_chunks(
  function: Callable,
  queries: dict[str, np.ndarray],
  keys: dict[str, np.ndarray],
  *,
  mesh: Mesh,
  max_scores: int = _MAX_SCORES,
) -> np.ndarray:
  """Applies a function to all keys and a chunk of queries at a time.

  Args:
    function: jitted; gets `keys` whole and as many rows of `queries`, and
      returns an array with a row for each query.
    queries: arrays `[N, ...]`.
    keys: arrays `[M, ...]`.
    mesh: the queries of a chunk are spread over it.
    max_scores: bound on chunk size times M.

  Returns:
    The rows of all queries, `[N, ...]`.
  """
  (count,) = {len(value) for value in queries.values()}
  (width,) = {len(value) for value in keys.values()}
  chunk = min(count, max(1, max_scores // width))
  chunk = _batching.padded_size(chunk, mesh)

  def batches():
    for start in range(0, count, chunk):
      rows = {name: x[start : start + chunk] for name, x in queries.items()}
      rows = {name: _batching.pad_rows(x, chunk) for name, x in rows.items()}
      yield rows | {"mask": np.arange(chunk) < count - start}

  everywhere = _batching.put(keys, mesh, whole=True)
  return _batching.run_batches(function, everywhere, batches(), mesh)


@functools.lru_cache(maxsize=8)
def _compiled_ranks(mesh: Mesh):
  return _batching.jit(_ranks, mesh)


def cosines(queries: jax.Array, keys: jax.Array) -> jax.Array:
  """Scores `[Q, E]` with `[M, E]`: `[Q, M]`, -inf for what is no number."""
  scores = jnp.matmul(
    queries,
    keys.T,
    precision=jax.lax.Precision.HIGHEST,  # no bf16 or TF32 products
  )
  return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def _ranks(all_keys, batch) -> jax.Array:
  """Computes `rank_all` for one chunk, int32 `[chunk, 4]`."""
  scores = cosines(batch["queries"], all_keys["keys"])
  right = batch["owner"][:, None] == all_keys["owner"][None]
  best = jnp.where(right, scores, -jnp.inf).max(axis=1, keepdims=True)
  above = scores > best + _batching.TIE
  tied = (scores >= best - _batching.TIE) & ~above
  top = scores.max(axis=1, keepdims=True)
  return jnp.stack(
    [
      (above & ~right).sum(axis=1, dtype=jnp.int32),
      (tied & ~right).sum(axis=1, dtype=jnp.int32),
      (tied & right).sum(axis=1, dtype=jnp.int32),
      (scores >= top - _batching.TIE).argmax(axis=1).astype(jnp.int32),
    ],
    axis=1,
  )


def recall(
  above: Sequence[int], tied: Sequence[int], right: Sequence[int], k: int
) -> np.ndarray:
  """Probability that a right key is among the first k, ties broken at random.

  Args:
    above: int `[N]`, wrong keys above the best right one.
    tied: int `[N]`, wrong keys tied with it.
    right: int `[N]`, right keys tied with it, at least 1.
    k: places.

  Returns:
    float64 `[N]`.
  """
  above, tied, right = (np.asarray(x, np.int64) for x in (above, tied, right))
  places = np.maximum(k - above, 0)
  # Hypergeometric: all places of the tie go to wrong keys.
  miss = np.ones(len(above))
  for i in range(right.max(initial=0)):
    left = np.maximum(tied + right - i, 1)
    factor = np.clip((left - places) / left, 0, 1)
    miss *= np.where(i < right, factor, 1)
  return 1 - miss


def median_rank(
  above: Sequence[int], tied: Sequence[int], right: Sequence[int]
) -> float:
  """Median over all queries of the rank of the best right key: MedR.

  A tie is broken at random here, too: such a query counts as all the ranks
  that it may have, each with its probability. Of N keys that all tie, one of
  them right, the median rank is (N + 1) / 2, the one in the middle.

  Args:
    above, tied, right: as of `recall`.

  Returns:
    A rank, counted from 1, or the mean of the two in the middle.
  """

  def share(k: int) -> float:  # of the ranks that are k at most
    return float(recall(above, tied, right, k).mean())

  ranks = range(1, int(np.max(np.add(above, tied))) + 2)
  rounding = 1e-9
  low = bisect.bisect_left(ranks, 0.5 - rounding, key=share)
  high = bisect.bisect_right(ranks, 0.5 + rounding, key=share)
  return (ranks[low] + ranks[high]) / 2
