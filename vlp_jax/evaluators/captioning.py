"""Image captioning: greedy captions, judged by truth and by likeness.

On annotated pictures a caption is parsed and checked against the objects,
which needs no reference: `true` is exact where BLEU and CIDEr only compare
words. Those two are the COCO metrics (Papineni et al. 2002; Vedantam et al.
2015), through pycocoevalcap's scorers; words are split here, since its own
tokenizer starts a Java process.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Sequence

import numpy as np
from absl import logging

from vlp_jax.data import tokenizer
from vlp_jax.evaluators import _truth, base

# How many captions a run keeps to show.
_NUM_SAMPLES = 8


class Evaluator(base.Evaluator):
  """`exact`, on annotated pictures `true`, with pycocoevalcap `bleu4`, `cider`.

  `exact` is the share of captions that equal any of the picture's, word by
  word; `true` the share that parse and are true of the picture. Their
  `_chance` is what the same model's captions score at other pictures.

  Config field `max_len`: tokens of a caption, start and end included; 0 means
  the tokenizer's `max_len`.

  Attributes:
    samples: after `run`, a few dicts of `image_id`, `caption`, `references`
      and `true` (None where nobody can tell).
  """

  needs = ("generate",)
  fields = {"max_len": 0}  # noqa: RUF012

  def __init__(self, method, config, env):
    super().__init__(method, config, env)
    self.samples = []

  def run(self, params):
    captions = self.captions(params)
    references = [record["captions"] for record in self.records]
    exact = functools.partial(_exact, captions, [
      {tuple(words(text)) for text in texts} for texts in references
    ])
    metrics = {
      "exact": _truth.rate(exact, len(captions)),
      "exact_chance": _truth.moved_rate(exact, len(captions)),
    }
    verdicts = [None] * len(captions)
    if self.source.annotated:
      objects = [record["objects"] for record in self.records]
      true = lambda text, picture: _truth.is_true(  # noqa: E731
        captions[text], objects[picture]
      )
      verdicts = [true(i, i) for i in range(len(captions))]
      metrics["true"] = float(np.mean(verdicts))
      metrics["true_chance"] = _truth.moved_rate(true, len(captions))
    self.samples = [
      {
        "image_id": self.records[i]["image_id"],
        "caption": captions[i],
        "references": references[i],
        "true": verdicts[i],
      }
      for i in spread(len(captions), _NUM_SAMPLES)
    ]
    return metrics | likeness(captions, references)

  def captions(self, params) -> list[str]:
    """Writes a caption for every picture of the split."""
    ids = self.on_images(
      params,
      "generate",
      max_len=self.config.max_len or self.env.config.tokenizer.max_len,
      bos_id=tokenizer.BOS,
      eos_id=tokenizer.EOS,
    )
    return [self.env.tokenizer.decode(row) for row in ids]
