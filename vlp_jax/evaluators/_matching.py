"""Match scores of pairs of a picture and a text, picture by picture.

What the matching head attends to in a picture, its keys and values, costs
more than a text does, and is the same for all texts. So pairs are grouped by
picture: a batch of pictures gets its state once, all texts of these pictures
go through in tiles of one shape, and the state is dropped before the next
batch's is made. The device holds one batch's state, however many pictures
there are. A picture with very many texts, for which others of its batch would
have to wait, counts as several.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlp_jax.data import pipeline
from vlp_jax.evaluators import _batching, base
from vlp_jax.methods.base import Method, Params

# What the method must be able to do.
NEEDS = ("match_state", "match_score")
# Texts of each picture that are scored at once.
TILE = 8
# Texts that a picture is encoded once for.
MOST_TEXTS = 64


def score_pairs(
  evaluator: base.Evaluator,
  params: Params,
  pictures: np.ndarray,
  texts: np.ndarray,
  tokens: tuple[np.ndarray, np.ndarray],
  tile: int = TILE,
) -> np.ndarray:
  """Scores pairs with the method's `match_score`.

  Args:
    evaluator: has the pictures, and a method that has `NEEDS`.
    params: the method's parameters.
    pictures: int `[P]`, the place of each pair's picture.
    texts: int `[P]`, the place of each pair's text among the tokens.
    tokens: text int32 `[U, L]` and text_len int32 `[U]`.
    tile: texts of each picture that are scored at once.

  Returns:
    float32 `[P]`. A pair that is given twice is scored once.
  """
  text, text_len = tokens
  pairs = np.asarray(pictures, np.int64) * len(text) + texts
  pairs, inverse = np.unique(pairs, return_inverse=True)
  owner, chosen = np.divmod(pairs, len(text))
  owner, start, count = np.unique(owner, return_index=True, return_counts=True)
  owner, start, count = _cut(owner, start, count)
  # Pictures with equally many texts share a batch: tiles have few dummies.
  order = np.argsort(-count, kind="stable")
  owner, start, count = owner[order], start[order], count[order]

  mesh, size = evaluator.env.mesh, evaluator.batch_size
  make_state = _compiled_state(evaluator.method, mesh)
  score = _compiled_score(evaluator.method, mesh)
  scores = np.empty(len(pairs), np.float32)

  def one_batch(image: np.ndarray, rows: slice) -> None:
    """Scores all pairs of some pictures; their state ends with the call."""
    state = make_state(params, _batching.put({"image": image}, mesh))
    width = -(-count[rows].max() // tile) * tile
    column = np.arange(width)
    real = column < count[rows][:, None]
    # A dummy is the picture's first text once more: always a valid one.
    pair = start[rows][:, None] + np.where(real, column, 0)

    def tiles():
      for left in range(0, width, tile):
        ids = chosen[pair[:, left : left + tile]]
        ids = _batching.pad_rows(ids, size)
        yield {
          "text": text[ids],
          "text_len": text_len[ids],
          "mask": np.arange(size) < len(pair),
        }

    got = _batching.run_batches(score, (params, state), tiles(), mesh)
    got = got.reshape(width // tile, len(pair), tile)
    got = got.swapaxes(0, 1).reshape(len(pair), width)
    scores[pair[real]] = got[real]

  source = _batching.Subset(evaluator.source, owner.tolist())
  batches = pipeline.eval_images(source, evaluator.env.config, size)
  for number, batch in enumerate(batches):
    one_batch(batch["image"], slice(number * size, (number + 1) * size))
  return scores[inverse]


def _cut(
  owner: np.ndarray, start: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts runs of pairs, `[N]`, into runs of `MOST_TEXTS` and the rest."""
  parts = -(-count // MOST_TEXTS)
  first = np.cumsum(parts) - parts
  begun = MOST_TEXTS * (np.arange(parts.sum()) - np.repeat(first, parts))
  count = np.minimum(np.repeat(count, parts) - begun, MOST_TEXTS)
  return np.repeat(owner, parts), np.repeat(start, parts) + begun, count


@functools.lru_cache(maxsize=8)
def _compiled_state(method: Method, mesh: Mesh):
  """Jits `match_state`; its rows stay spread over the devices of all hosts."""
  rows = NamedSharding(mesh, P(("data", "fsdp")))
  return jax.jit(method.match_state, out_shardings=rows)


@functools.lru_cache(maxsize=8)
def _compiled_score(method: Method, mesh: Mesh):
  """Jits `match_score` in the form that `run_batches` calls."""

  def score(params_and_state: tuple[Params, Any], batch) -> jax.Array:
    params, state = params_and_state
    return method.match_score(params, state, batch["text"], batch["text_len"])

  return _batching.jit(score, mesh)
