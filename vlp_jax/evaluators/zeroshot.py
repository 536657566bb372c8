"""Zero-shot classification with prompt templates.

CLIP's protocol (Radford et al. 2021, section 3.1.4), as CoCa's: the embedding
of a class is the normalised mean of the normalised embeddings of its prompts,
and a picture belongs to the class of the nearest one.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.evaluators import base
from vlp_jax.evaluators.retrieval import rank_all, recall

# What most data sets say, and (by `annotated`) the language of scenes.
_TEMPLATES = {False: ("a photo of a {}.",), True: ("a {}",)}


class Evaluator(base.Evaluator):
  """`top1` and `top1_chance`; ties count as broken at random.

  The class of a picture is its record's `label` or `category`: a name, or a
  place in `classes`. Annotated pictures without either are used if they show
  a single object, whose class is its colour and shape ('red circle'); the
  classes are then all pairs of the colours and shapes of the split.

  Config fields:
    classes: the names, in order; empty means all that occur in the split.
    templates: prompts with `{}` where the name goes; empty means
      `_TEMPLATES`.
  """

  needs = ("encode_image", "encode_text")
  fields = {  # noqa: RUF012
    "classes": (),
    "templates": (),
  }

  def __init__(self, method, config, env):
    super().__init__(method, config, env)
    self.templates = config.templates or _TEMPLATES[self.source.annotated]
    if any("{}" not in template for template in self.templates):
      raise UserError(
        "zeroshot's templates must each hold '{}' where the class name goes, "
        f"but are {tuple(self.templates)}"
      )
    labels = [self._label(i) for i in range(len(self.records))]
    self._places = [i for i, label in enumerate(labels) if label is not None]
    if not self._places:
      raise base.NotApplicableError(
        "zero-shot classification is left out: no record of "
        f"{self.source.name!r} has a 'label' or 'category'"
      )
    labels = [labels[i] for i in self._places]
    self.classes = list(config.classes) or self._find_classes(labels)
    self._targets = np.array([self._index(label) for label in labels])

  def run(self, params):
    image = self.encode_images(params)[self._places]
    order = np.arange(len(self.classes))
    *ranks, _ = rank_all(
      image,
      self.class_embeddings(params),
      self._targets,
      order,
      mesh=self.env.mesh,
    )
    return {
      "top1": float(recall(*ranks, 1).mean()),
      "top1_chance": 1 / len(self.classes),
    }

  def class_embeddings(self, params) -> np.ndarray:
    """Embeds the classes, `[C, E]`, L2-normalised."""
    prompts = [
      template.replace("{}", name)
      for name in self.classes
      for template in self.templates
    ]
    text = self.encode_texts(params, prompts)
    mean = text.reshape(len(self.classes), len(self.templates), -1).mean(axis=1)
    norm = np.linalg.norm(mean, axis=1, keepdims=True)
    return mean / np.maximum(norm, 1e-12)

  def _label(self, index: int) -> int | str | None:
    try:
      return _label(self.records[index])
    except (TypeError, ValueError, OverflowError):
      record = self.records[index]
      label = record.get("label", record.get("category"))
      # Whose data it is has not asked for zeroshot unless it names classes.
      error = UserError if self.config.classes else base.NotApplicableError
      raise error(
        f"{self.source.describe(index)} has the label {label!r}; zeroshot "
        "takes a name or a whole number"
      ) from None

  def _find_classes(self, labels) -> list[str]:
    """Lists the classes of the split."""
    if any(isinstance(label, int) for label in labels):
      raise base.NotApplicableError(
        "zero-shot classification is left out: the labels of "
        f"{self.source.name!r} are numbers; name the classes, in order, in "
        "zeroshot's field classes"
      )
    if not self.source.annotated:
      return sorted(set(labels))
    things = [thing for r in self.records for thing in r["objects"]]
    colors = sorted({thing["color"] for thing in things})
    shapes = sorted({thing["shape"] for thing in things})
    pairs = {f"{c} {s}" for c, s in itertools.product(colors, shapes)}
    return sorted(pairs | set(labels))

  def _index(self, label: int | str) -> int:
    """Returns the place of a picture's class."""
    if isinstance(label, int) and 0 <= label < len(self.classes):
      return label
    if label in self.classes:
      return self.classes.index(label)
    raise UserError(
      f"{self.source.name!r} has a picture of the class {label!r}, which is "
      "not among zeroshot's classes"
    )


def _label(record: dict[str, Any]) -> int | str | None:
  """Returns the class of a record, or None if it has none.

  Raises:
    TypeError, ValueError, OverflowError: if its label is neither a text nor a
      whole number.
  """
  label = record.get("label", record.get("category"))
  if isinstance(label, (list, tuple)):  # a path, outermost first
    label = label[0] if label else None
  if isinstance(label, bytes):
    label = label.decode()
  elif label is not None and not isinstance(label, str):
    if int(label) != label:
      raise ValueError
    label = int(label)
  if label not in (None, "", -1):  # -1 is what TFDS gives the unlabelled
    return label
  things = record.get("objects") or ()
  if len(things) == 1:
    return f"{things[0]['color']} {things[0]['shape']}"
  return None
