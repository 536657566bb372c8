"""Retrieval in two stages: embeddings choose, the matching head decides.

Protocol of ALBEF (Li et al. 2021, section 4) and SIMLA: all pictures and all
captions are ranked by cosine; the best k of each query, its candidates, are
ranked again by how well the matching head says that picture and text fit.
What is no candidate ranks below all candidates.

Recalls, ranks, ties and chance are as in `retrieval.py`. Captions that are the
same to the model, token by token, are one candidate and are scored once. A
match score that is not a number is as bad as not to be a candidate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlp_jax.errors import UserError
from vlp_jax.evaluators import _batching, _matching, retrieval


class _Texts(NamedTuple):
  """The captions that differ in their tokens.

  Attributes:
    tokens: text `[U, L]` and text_len `[U]`.
    first: int `[U]`, the first caption that has these tokens.
    place: int `[M]`, the place of each caption among them.
  """

  tokens: tuple[np.ndarray, np.ndarray]
  first: np.ndarray
  place: np.ndarray


class Evaluator(retrieval.Evaluator):
  """The metrics of `retrieval`, each with its `_chance`.

  Config fields:
    captions: as of `retrieval`.
    k: candidates of each query.

  Attributes:
    tile: texts of each picture that are scored at once; changes no number.
  """

  needs = (*retrieval.Evaluator.needs, *_matching.NEEDS)
  fields = {**retrieval.Evaluator.fields, "k": 16}  # noqa: RUF012
  tile = _matching.TILE

  def __init__(self, method, config, env):
    if config.k < 1:
      raise UserError(
        f"{config.type}'s field k is {config.k}; each query needs a candidate"
      )
    super().__init__(method, config, env)

  @functools.cached_property
  def _texts(self) -> _Texts:
    text, text_len = self.tokenize(self._queries[0])
    _, first, place = np.unique(
      np.column_stack([text_len, text]),
      axis=0,
      return_index=True,
      return_inverse=True,
    )
    tokens = np.asarray(text)[first], np.asarray(text_len)[first]
    return _Texts(tokens, first, place.reshape(-1))

  def _rank(self, params):
    captions, owner = self._queries
    tokens, first, place = self._texts
    image = self.encode_images(params)
    text = self.encode_texts(params, captions)[first]
    near = functools.partial(nearest, k=self.config.k, mesh=self.env.mesh)
    found_text, found_image = near(image, text), near(text, image)
    # Both directions at once: a pair that both need is scored once.
    picture = np.arange(len(image)).repeat(found_text.shape[1])
    query = np.arange(len(text)).repeat(found_image.shape[1])
    score = _matching.score_pairs(
      self,
      params,
      np.concatenate([picture, found_image.reshape(-1)]),
      np.concatenate([found_text.reshape(-1), query]),
      tokens,
      self.tile,
    )
    i2t_score = score[: found_text.size].reshape(found_text.shape)
    t2i_score = score[found_text.size :].reshape(found_image.shape)

    own = np.bincount(owner, minlength=len(image))
    right = _how_often(owner, place, found_text)
    all_alike = np.bincount(place)[found_text]
    i2t = ranks(i2t_score, right, all_alike - right, own, len(captions) - own)
    # From here on a caption is a query, whether another is like it or not.
    found_image, t2i_score = found_image[place], t2i_score[place]
    right = found_image == owner[:, None]
    one = np.ones_like(owner)
    t2i = ranks(t2i_score, right, ~right, one, len(image) - one)
    return retrieval.rank_metrics(i2t, t2i), (
      first[_best(i2t_score, found_text)],
      _best(t2i_score, found_image),
    )


def nearest(
  queries: np.ndarray, keys: np.ndarray, k: int, *, mesh: Mesh
) -> np.ndarray:
  """Finds the k keys with the highest cosine, or all if there are fewer.

  Args:
    queries: float `[N, E]`.
    keys: float `[M, E]`.
    k: keys to find; where cosines tie for the last place, the first ones.
    mesh: where to compute.

  Returns:
    int `[N, min(k, M)]`, places of keys, the nearest first.
  """
  return retrieval.by_chunks(
    _compiled_top(min(k, len(keys)), mesh),
    {"queries": np.asarray(queries, np.float32)},
    {"keys": np.asarray(keys, np.float32)},
    mesh=mesh,
  )


@functools.lru_cache(maxsize=8)
def _compiled_top(k: int, mesh: Mesh):
  def top(keys, batch) -> jax.Array:
    scores = retrieval.cosines(batch["queries"], keys["keys"])
    # What differs in the last bits only is a tie, as in `retrieval`.
    return jax.lax.top_k(jnp.round(scores / _batching.TIE), k)[1]

  return _batching.jit(top, mesh)


def ranks(
  scores: np.ndarray,
  right: np.ndarray,
  wrong: np.ndarray,
  all_right: np.ndarray,
  all_wrong: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Ranks the candidates of N queries, and all other keys below them.

  A candidate may stand for several keys that are alike.

  Args:
    scores: float32 `[N, k]`, of the candidates.
    right: int `[N, k]`, the right keys that each stands for.
    wrong: int `[N, k]`, the wrong ones.
    all_right: int `[N]`, right keys in all, candidates or not.
    all_wrong: int `[N]`, wrong ones.

  Returns:
    What `retrieval.recall` wants: wrong keys above the best right one, wrong
    keys tied with it, right keys tied with it.
  """
  scores = np.where(np.isnan(scores), -np.inf, scores)
  best = np.where(right > 0, scores, -np.inf).max(axis=1, keepdims=True)
  above = scores > best + _batching.TIE
  tied = (scores >= best - _batching.TIE) & ~above
  num_above = (above * wrong).sum(axis=1)
  # Else the right keys share the last place with all that has no score.
  found = best[:, 0] > -np.inf
  num_tied = np.where(found, (tied * wrong).sum(axis=1), all_wrong - num_above)
  num_right = np.where(found, (tied * right).sum(axis=1), all_right)
  return num_above, num_tied, num_right


def _best(scores: np.ndarray, found: np.ndarray) -> np.ndarray:
  """Returns the candidate with the best score; in a tie the nearest one."""
  scores = np.where(np.isnan(scores), -np.inf, scores)
  top = scores.max(axis=1, keepdims=True) - _batching.TIE
  place = (scores >= top).argmax(axis=1)
  return found[np.arange(len(found)), place]


def _how_often(
  owner: np.ndarray, place: np.ndarray, found: np.ndarray
) -> np.ndarray:
  """Counts each picture's own captions that are like its candidates.

  Args:
    owner: int `[M]`, the picture of each caption.
    place: int `[M]`, what each caption is to the model.
    found: int `[N, k]`, candidates of the pictures, such as `place` has.

  Returns:
    int `[N, k]`.
  """
  count = place.max() + 1
  keys, often = np.unique(
    owner.astype(np.int64) * count + place, return_counts=True
  )
  wanted = np.arange(len(found))[:, None] * count + found
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, often[at], 0)
