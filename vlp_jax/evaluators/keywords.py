"""Shows the keywords of a few captions, and those that the picture adds."""

from __future__ import annotations

import jax

from vlp_jax.evaluators import _batching, base


class Evaluator(base.Evaluator):
  """Prints examples; the only metric is `chosen`, keywords a caption.

  For each of `examples` pictures, spread over the split: its first caption,
  the words of it that are labels of the picture, and the words that the
  method, seeing the picture alone, holds most likely beside them.

  Config field `examples`: how many pictures are shown.
  """

  needs = ("keywords",)
  captioned = True
  fields = {"examples": 4}  # noqa: RUF012

  def __init__(self, method, config, env):
    super().__init__(method, config, env)
    if not method.keyword_weight:
      raise base.NotApplicableError(
        "evaluation of keywords is left out: config.method.keyword_weight=0 "
        "learns none"
      )

  def run(self, params):
    places = _batching.spread(len(self.records), self.config.examples)
    captions = [self.records[place]["captions"][0] for place in places]
    pairs = list(zip(places, captions, strict=True))
    chosen = self.on_pairs(self._compiled("chosen"), params, pairs)
    added = self.on_pairs(self._compiled("added"), params, pairs)
    if jax.process_index() == 0:
      print("keywords of captions, and what the pictures add:")
      for caption, own, more in zip(captions, chosen, added, strict=True):
        print(f"  {caption!r}: {self._words(own)}; adds {self._words(more)}")
    return {"chosen": float((chosen >= 0).sum(axis=1).mean())}

  def _compiled(self, part: str):
    def call(params, batch):
      return self.method.keywords(params, batch)[part]

    return _batching.jit(call, self.env.mesh)

  def _words(self, ids) -> str:
    return ", ".join(self.decode([i]) or f"<{i}>" for i in ids if i >= 0)
