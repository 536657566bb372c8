"""A run's `pictures/`: what a model does, for somebody to look at.

Examples are taken at even steps from the split; nobody chose them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from types import ModuleType

import jax
import matplotlib
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlp_jax.data import joint
from vlp_jax.errors import UserError
from vlp_jax.evaluators import (
  _batching,
  _curves,
  _plots,
  _regions,
  _truth,
  base,
)
from vlp_jax.evaluators._plots import (
  ALSO_TRUE,
  BODY,
  FALSE,
  GREY,
  HEAT,
  LINE,
  PLAIN,
  RIGHT,
  SMALL,
  TRUE,
  WRONG,
  Sheet,
  draw_heat,
  fold,
)
from vlp_jax.evaluators.captioning import generator
from vlp_jax.methods.base import Method, Params

# Galleries search among these many pictures at most.
_MOST = 1000
_FIRST = 5  # places of a gallery


def make_pictures(
  method: Method, params: Params, env: base.Env, workdir: str | pathlib.Path
) -> list[pathlib.Path]:
  """Draws what the method can do on the test split, or on validation.

  Args:
    method: what was trained; pictures that need what it lacks are left out.
    params: its parameters.
    env: where to evaluate.
    workdir: gets `pictures/*.png`; its `metrics.jsonl` is read.

  Returns:
    The files.
  """
  folder = pathlib.Path(workdir) / "pictures"
  envs = {"": env}
  if joint.has_clips(env.config):
    envs["_clips"] = env.clips
  paths = []
  with _plots.style():
    for suffix, one in envs.items():
      examples = _open(method, one)
      if examples is None:
        continue
      for name, make in _MAKERS.items():
        sheet = make(examples, params)
        if sheet is not None:
          paths.append(sheet.save(folder / f"{name}{suffix}.png"))
    sheet = _curves.loss_curves(method, pathlib.Path(workdir) / "metrics.jsonl")
    if sheet is not None:
      paths.append(sheet.save(folder / "loss_curves.png"))
  return paths


class _Examples(base.Evaluator):
  """A split to take examples from."""

  captioned = True

  @property
  def num_frames(self) -> int:
    """Frames of a clip; 0 if the data are pictures."""
    return self.env.config.data.num_frames

  def first_captions(self) -> list[str]:
    return [record["captions"][0] for record in self.records]

  @property
  def where(self) -> str:
    """Says where examples are from, and how clips are shown."""
    clips = "A clip is shown as its frames, row by row. "
    return (clips if self.num_frames else "") + (
      f"Examples at even steps from the split '{self.config.split}'; nobody "
      "chose them."
    )


def _open(method: Method, env: base.Env) -> _Examples | None:
  for split in ("test", "validation"):
    try:
      if len(env.source(split)):
        fields = {"split": split, "max_examples": _MOST}
        config = ml_collections.ConfigDict(base.COMMON_FIELDS | fields)
        examples = _Examples(method, config, env)
        if len(examples.source):
          return examples
    except UserError:
      continue
  return None


# ------------------------------------------------------------- retrieval


class _Ranking:
  """Scores of all pictures and first captions of the examples."""

  def __init__(self, examples: _Examples, params: Params):
    self.texts = examples.first_captions()
    image = examples.encode_images(params)
    self.scores = image @ examples.encode_texts(params, self.texts).T
    self._language = examples.source.language
    self._records = examples.records

  def verdict(self, picture: int, text: int):
    """Judges a caption, by place, at a picture."""
    if picture == text:
      return RIGHT
    if self._language is None:
      return WRONG
    meaning = self._language.parse(self.texts[text])
    objects = self._records[picture]["objects"]
    true = _truth.holds(self._language, meaning, objects)
    return ALSO_TRUE if true else WRONG

  def legend(self) -> list[tuple[str, str]]:
    meanings = [(RIGHT, "right: its own"), (WRONG, "wrong")]
    if self._language is not None:
      meaning = "also true: another's, but the caption is true of the picture"
      meanings.insert(1, (ALSO_TRUE, meaning))
    return [(verdict[1], meaning) for verdict, meaning in meanings]


def _best(scores: np.ndarray) -> np.ndarray:
  return np.argsort(-scores, kind="stable")[:_FIRST]


def _place(scores: np.ndarray, own: int) -> str:
  place = 1 + int((scores > scores[own]).sum())
  return f"place {place:,} of {len(scores):,}"


def _text_to_image(examples: _Examples, params: Params) -> Sheet:
  """Draws the pictures that the model finds for captions."""
  ranking = _Ranking(examples, params)
  queries = _batching.spread(len(ranking.texts), 6)
  side, left, row = 1.4, 3.0, 1.95
  sheet = Sheet(
    "Text to image: which pictures does the model find for a caption?",
    f"Each row starts with a caption. Beside it are the pictures, out of "
    f"{len(ranking.texts):,}, that the model holds nearest to it, the nearest "
    "first, each with its cosine similarity. A good model has its own picture "
    f"first. {examples.where}",
    left + _FIRST * (side + 0.15),
    len(queries) * row,
    ranking.legend(),
  )
  for i, query in enumerate(queries):
    y, scores = i * row, ranking.scores[:, query]
    text = fold(f"“{ranking.texts[query]}”", left - 0.3, BODY, 5)
    sheet.text(0, y, text)
    place = f"own picture: {_place(scores, query)}"
    sheet.text(0, y + side - 0.1, place, color=GREY, size=SMALL)
    for j, found in enumerate(_best(scores)):
      x, verdict = left + j * (side + 0.15), ranking.verdict(found, query)
      sheet.image(x, y, side, examples.image(found), verdict)
      sheet.verdict(x, y + side + 0.06, verdict, f"  {scores[found]:.2f}")
  return sheet


def _image_to_text(examples: _Examples, params: Params) -> Sheet:
  """Draws the captions that the model finds for pictures."""
  ranking = _Ranking(examples, params)
  queries = _batching.spread(len(ranking.texts), 6)
  side, left, width, row, line = 1.45, 1.75, 7.5, 1.8, 0.24
  sheet = Sheet(
    "Image to text: which captions does the model find for a picture?",
    f"Beside each picture are the captions, out of {len(ranking.texts):,}, "
    "that the model holds nearest to it, the nearest first, each with its "
    "cosine similarity. A good model has the picture's own caption first. "
    f"{examples.where}",
    left + width,
    len(queries) * row,
    ranking.legend(),
  )
  for i, query in enumerate(queries):
    y, scores = i * row, ranking.scores[query]
    sheet.image(0, y, side, examples.image(query))
    for j, found in enumerate(_best(scores)):
      verdict = ranking.verdict(query, found)
      sheet.verdict(left, y + j * line, verdict)
      sheet.text(left + 0.85, y + j * line, f"{scores[found]:.2f}", size=SMALL)
      text = fold(ranking.texts[found], width - 1.4, SMALL, 1)
      sheet.text(left + 1.4, y + j * line, text, size=SMALL)
    own = f"own caption, {_place(scores, query)}: {ranking.texts[query]}"
    text = fold(own, width, SMALL, 1)
    sheet.text(left, y + _FIRST * line, text, size=SMALL, color=GREY)
  return sheet


# -------------------------------------------------------------- heat maps


def _phrases(
  record: dict, language: ModuleType | None = None, num_frames: int = 0
) -> list[tuple[str, list]]:
  """Returns texts to point at, with boxes where those are known."""
  if language is not None:
    if len(record["objects"]) < 2:
      return []
    if "phrases" in record:
      return [(p["text"], [p["bbox"]]) for p in record["phrases"]]
    named = record["captions"][0], record["objects"], num_frames
    found = _regions.phrases(language, *named)
    return [(p.text, _plots.in_mosaic(p.frames)) for p in found]
  words = (word.strip(".,;:!?") for word in record["captions"][0].split())
  words = sorted(dict.fromkeys(words), key=len, reverse=True)
  return [(word, []) for word in words[:3] if word]


def _heatmaps(examples: _Examples, params: Params) -> Sheet | None:
  """Draws where the model sees what a phrase names."""
  if not examples.has("patch_text_map"):
    return None
  if not getattr(examples.method, "readouts", ()):
    return None
  language = examples.source.language
  pairs = [
    (i, phrase)
    for i, record in enumerate(examples.records)
    if (phrase := _phrases(record, language, examples.num_frames)[:3])
  ]
  pairs = [pairs[i] for i in _batching.spread(len(pairs), 5)]
  if not pairs:
    return None
  readout = _readout(examples)
  maps = examples.on_pairs(
    examples.compiled("patch_text_map", readout=readout),
    params,
    [(i, text) for i, phrases in pairs for text, _ in phrases],
  )
  low, high = (matplotlib.colormaps[HEAT](v) for v in (0.05, 0.92))
  side, step, row = 1.9, 2.15, 2.85
  hint = (
    "The dashed box is where the object is; it is a hit if the cross, the "
    "strongest patch, lies in it. "
    if language is not None
    else "The cross is the strongest patch. "
  )
  sheet = Sheet(
    "Heat maps: where does the model see what a phrase names?",
    "Left the picture, then one copy for each phrase; the brighter a patch, "
    f"the more it speaks for the phrase (readout: {readout}). {hint}"
    f"{examples.where}",
    4 * step,
    len(pairs) * row,
    [(low, "weakest patch"), (high, "strongest patch")],
  )
  maps = iter(maps)
  for i, (picture, phrases) in enumerate(pairs):
    y, pixels = i * row, examples.image(picture)
    sheet.image(0, y + 0.45, side, pixels)
    for j, (text, boxes) in enumerate(phrases, 1):
      lines = fold(text, side, SMALL, 2)
      above = y + 0.42 - len(lines) * SMALL * LINE
      sheet.text(j * step, above, lines, size=SMALL)
      axes = sheet.image(j * step, y + 0.45, side, pixels)
      inside = draw_heat(axes, next(maps), boxes)
      words = {None: "no answer: a flat map", True: "hit", False: "miss"}
      if inside is None or boxes:
        verdict = (words[inside], *(RIGHT if inside else WRONG)[1:])
        sheet.verdict(j * step, y + side + 0.5, verdict)
  return sheet


def _readout(examples: _Examples) -> str:
  """Returns the readout that the run's pointing game names, or the first."""
  for fields in examples.env.config.evals.values():
    if fields.get("readout") in examples.method.readouts:
      return fields.readout
  return examples.method.readouts[0]


# ------------------------------------- captions and masked reconstruction


def _captions(examples: _Examples, params: Params) -> Sheet | None:
  """Draws pictures with the captions that the model writes."""
  if not examples.has("generate"):
    return None
  shown = _batching.spread(len(examples.records), 8)
  ids = examples.on_images(generator(examples), params, shown)
  language = examples.source.language
  side, step, row = 2.1, 2.5, 4.25
  sheet = Sheet(
    "Captions: what does the model write about a picture?",
    "Under each picture is the model's caption, written greedily, and in grey "
    "one that people or the data's makers gave it. "
    + ("A caption is true if all that it says holds. " if language else "")
    + examples.where,
    4 * step,
    -(-len(shown) // 4) * row,
    [(TRUE[1], "true"), (FALSE[1], "false, or no sentence")]
    if language
    else (),
  )
  for place, (i, written) in enumerate(zip(shown, ids, strict=True)):
    x, y, record = place % 4 * step, place // 4 * row, examples.records[i]
    caption, verdict = examples.decode(written), PLAIN
    if language:
      meaning = language.parse(caption)
      true = _truth.holds(language, meaning, record["objects"])
      verdict = TRUE if true else FALSE
      sheet.verdict(x, y + side + 0.06, verdict)
    sheet.image(x, y, side, examples.image(i), verdict)
    text = fold(caption or "(nothing)", side + 0.2, BODY, 4)
    sheet.text(x, y + side + 0.28, text)
    below = y + side + 0.36 + len(text) * BODY * LINE
    given = fold(f"given: {record['captions'][0]}", side + 0.2, SMALL, 4)
    sheet.text(x, below, given, size=SMALL, color=GREY)
  return sheet


def _reconstruction(examples: _Examples, params: Params) -> Sheet | None:
  """Draws what the model makes of hidden patches, given the caption."""
  if not examples.has("reconstruct"):
    return None
  shown = _batching.spread(len(examples.records), 6)
  captions = [examples.records[i]["captions"][0] for i in shown]
  env = examples.env
  text, text_len = examples.tokenize(captions)
  image = np.stack([examples.image(i) for i in shown])
  batch = {"image": image, "text": text, "text_len": text_len}
  batch = _batching.put(batch, env.mesh, whole=True)
  everywhere = NamedSharding(env.mesh, PartitionSpec())
  draw = jax.jit(examples.method.reconstruct, out_shardings=everywhere)
  made = jax.device_get(draw(params, batch, jax.random.key(0)))
  side, step, row = 1.8, 2.05, 2.0
  sheet = Sheet(
    "Reconstruction: can the model draw what is hidden, told the caption?",
    "Left, what the model sees: the patches that it finds most like the "
    "caption are hidden (grey). Middle, what it draws in their place, from "
    "the other patches and the caption; the rest is copied. Right, the "
    "original. "
    f"{_target_note(examples.method)}{examples.where}",
    3 * step + 3.2,
    len(shown) * row + 0.3,
  )
  for j, heading in enumerate(("seen", "drawn", "original", "caption")):
    sheet.text(j * step, 0, heading, weight="bold")
  for i, caption in enumerate(captions):
    y = i * row + 0.3
    for j, pixels in enumerate((made["masked"], made["prediction"], image)):
      sheet.image(j * step, y, side, pixels[i])
    sheet.text(3 * step, y, fold(caption, 3.1, BODY, 6))
    hidden = f"hidden: {made['mask'][i].mean():.0%} of the patches"
    sheet.text(3 * step, y + side - 0.2, hidden, size=SMALL, color=GREY)
  return sheet


def _target_note(method: Method) -> str:
  if getattr(method, "target", "") != "normalized":
    return ""
  return (
    "The model predicts the pattern of a patch; its mean and contrast are the "
    "original's. "
  )


_MAKERS: dict[str, Callable] = {
  "retrieval_text_to_image": _text_to_image,
  "retrieval_image_to_text": _image_to_text,
  "heatmaps": _heatmaps,
  "captions": _captions,
  "reconstruction": _reconstruction,
}
