"""Forced choice between a true text and a false one about the same picture.

The false text has the words of the true one, or nearly: what separates them
is which words belong together. Compare Winoground (Thrush et al. 2022) and
ARO (Yuksekgonul et al. 2023).
"""

from __future__ import annotations

import functools
from typing import ClassVar

import numpy as np

from vlp_jax.evaluators import _batching, _matching, _truth, base


class Probe(base.Evaluator):
  """`contrastive`, `captioner` and `matching`: how often the true text wins.

  The contrastive answer is the nearer embedding; the captioner's, if the
  method has one, the text with the higher mean log-likelihood per token; the
  matching head's, if there is one, the text with the higher match score. A
  tie is half a win, and chance one half. `bag` is what knowing only the sets
  of colours and shapes (and of a clip's motions) of text and picture scores;
  `one_frame` is what nobody exceeds who sees one frame of a clip.

  Attributes:
    annotations: one, the records' field with the pairs of texts.
    one_frame: as above, where it is known; see `data/one_frame.py`.
  """

  needs = ("encode_image", "encode_text")
  one_frame: ClassVar[float | None] = None

  @functools.cached_property
  def _pairs(self) -> list[tuple[int, str, str]]:
    """Place of the picture, true text and false text."""
    return [
      (i, pair["true"], pair["false"])
      for i, record in enumerate(self.records)
      for pair in record[self.annotations[0]]
    ]

  def run(self, params):
    if not self._pairs:
      return {}
    places = [i for i, _, _ in self._pairs]
    # One list, true and false side by side: the picture is decoded once.
    texts = [text for _, true, false in self._pairs for text in (true, false)]
    image = self.encode_images(params)[places]
    text = self.encode_texts(params, texts)
    metrics = {
      "contrastive": wins(_cosines(image, text)),
      "contrastive_chance": 0.5,
      "bag": self._bag_of_attributes,
    }
    if self.one_frame is not None:
      metrics["one_frame"] = self.one_frame
    if self.has("caption_score"):
      pairs = list(zip(np.repeat(places, 2).tolist(), texts, strict=True))
      score = self.on_pairs(self.compiled("caption_score"), params, pairs)
      metrics["captioner"] = wins(score)
      metrics["captioner_chance"] = 0.5
    if all(self.has(need) for need in _matching.NEEDS):
      metrics["matching"] = wins(self._match(params, places, texts))
      metrics["matching_chance"] = 0.5
    return metrics

  def _match(self, params, places: list[int], texts: list[str]) -> np.ndarray:
    """Scores the pictures of P pairs with their two texts, `[2 P]`."""
    most = 2 * np.bincount(places).max()
    return _matching.score_pairs(
      self,
      params,
      np.repeat(places, 2),
      np.arange(len(texts)),
      self.tokenize(texts),
      tile=min(int(most), _matching.TILE),
    )

  @functools.cached_property
  def _bag_of_attributes(self) -> float:
    objects = [self.records[i]["objects"] for i, _, _ in self._pairs]
    texts = [text for _, true, false in self._pairs for text in (true, false)]
    bags = _truth.bag_vectors(self.source.language, objects, texts)
    return wins(_cosines(*bags))


def _cosines(image: np.ndarray, text: np.ndarray) -> np.ndarray:
  """Scores `[P, E]` pictures with their two texts `[2 P, E]`, `[2 P]`."""
  return (np.repeat(image, 2, axis=0) * text).sum(axis=1)


def wins(scores: np.ndarray) -> float:
  """Share of pairs whose true text wins; `[2 P]`, true and false in turn."""
  true, false = scores[::2], scores[1::2]
  tie = ~(
    np.abs(true - false) > _batching.TIE
  )  # also where one is not a number
  return float(np.mean(np.where(tie, 0.5, true > false)))
