"""Image captioning: greedy captions, judged by truth and by likeness.

On annotated pictures a caption is parsed and checked against the objects,
which needs no reference: `true` is exact where BLEU and CIDEr only compare
words. Those two are the COCO metrics (Papineni et al. 2002; Vedantam et al.
2015), through pycocoevalcap's scorers; words are split here, since its own
tokenizer starts a Java process.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from vlp_jax.evaluators import _batching, _truth, base

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
  captioned = True
  fields = {"max_len": 0}  # noqa: RUF012

  def __init__(self, method, config, env):
    super().__init__(method, config, env)
    self.samples = []

  def run(self, params):
    captions = self.captions(params)
    references = [record["captions"] for record in self.records]
    allowed = [{tuple(words(t)) for t in texts} for texts in references]
    spoken = [tuple(words(caption)) for caption in captions]
    own = range(len(captions))

    def exact(text, picture):
      return spoken[text] in allowed[picture]

    metrics = {
      "exact": float(np.mean([exact(i, i) for i in own])),
      "exact_chance": _truth.moved_rate(exact, own),
    }
    verdicts = [None] * len(captions)
    language = self.source.language
    if language is not None:
      meanings = [language.parse(caption) for caption in captions]

      def true(text, picture):
        objects = self.records[picture]["objects"]
        return _truth.holds(language, meanings[text], objects)

      verdicts = [true(i, i) for i in own]
      metrics["true"] = float(np.mean(verdicts))
      metrics["true_chance"] = _truth.moved_rate(true, own)
    self.samples = [
      {
        "image_id": self.records[i]["image_id"],
        "caption": captions[i],
        "references": references[i],
        "true": verdicts[i],
      }
      for i in _batching.spread(len(captions), _NUM_SAMPLES)
    ]
    return metrics | likeness(captions, references)

  def captions(self, params) -> list[str]:
    """Writes a caption for every picture of the split."""
    ids = self.on_images(generator(self, self.config.max_len), params)
    return [self.decode(row) for row in ids]


def generator(evaluator: base.Evaluator, max_len: int = 0) -> Callable:
  """Returns the jitted greedy captioner of an evaluator's method."""
  tokenizer = evaluator.env.tokenizer
  return evaluator.compiled(
    "generate",
    max_len=max_len or evaluator.env.config.tokenizer.max_len,
    bos_id=tokenizer.bos_id,
    eos_id=tokenizer.eos_id,
  )


def words(text: str) -> list[str]:
  """Splits a text into lower-case words, without punctuation."""
  return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def likeness(
  captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Computes `bleu4` and `cider`, or nothing without pycocoevalcap.

  Args:
    captions: one a picture.
    references: the captions of each picture.
  """
  try:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
  except ImportError:
    logging.info(
      "captioning: bleu4 and cider are left out; they need the [eval] extra "
      "(pip install pycocoevalcap)"
    )
    return {}
  told = {i: [" ".join(words(text))] for i, text in enumerate(captions)}
  known = {
    i: [" ".join(words(text)) for text in texts]
    for i, texts in enumerate(references)
  }
  with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its lengths
    bleu, _ = Bleu(4).compute_score(known, told)
    cider, _ = Cider().compute_score(known, told)
  return {"bleu4": float(bleu[3]), "cider": float(cider)}
