"""What evaluators share: where they run, batches on the mesh, and `build`.

An evaluator is a file of this folder whose name is its `type` in the config.
It sees parameters and a split of the data, returns flat numbers, and keeps
its hands off everything else: no training state, no global random numbers.
Every metric is a sum over examples divided once on the host, and padding is
dropped by a mask, so results do not depend on the evaluation batch size.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pathlib
import pkgutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from vlp_jax.data import captions, joint, pipeline, sources, transforms
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.errors import UserError
from vlp_jax.evaluators import _records
from vlp_jax.evaluators._batching import (
  Subset,
  compiled,
  pad_rows,
  padded_size,
  run_batches,
)
from vlp_jax.methods.base import Method, Params

# The fields of every `evals.<name>`, and what holds where a config is silent.
COMMON_FIELDS = {
  "type": "",
  "split": "validation",
  "clips": False,  # of `config.clips` instead of `config.data`
  "every_steps": 0,
  "prefix": "eval",
  "batch_size": 128,
  "use_ema": False,
  "max_examples": 0,
}


class NotApplicableError(UserError):
  """The data, or what was trained, cannot serve an evaluator.

  `build_all` leaves it out.
  """


class _Memo:
  """Values computed from one set of parameters, forgotten with the next.

  Parameters are known by the identity of their arrays. They are held weakly:
  a cache must not keep old weights on the device.
  """

  def __init__(self):
    self._owner = []
    self._values = {}

  def get(self, params: Params, key, compute: Callable[[], Any]) -> Any:
    leaves = jax.tree.leaves(params)
    same = len(leaves) == len(self._owner) and all(
      ref() is leaf for ref, leaf in zip(self._owner, leaves, strict=True)
    )
    if not same:
      self._owner = [weakref.ref(leaf) for leaf in leaves]
      self._values = {}
    if key not in self._values:
      self._values[key] = compute()
    return self._values[key]


@dataclasses.dataclass(frozen=True)
class Env:
  """Where evaluators run.

  Attributes:
    config: the run's whole config.
    mesh: axes ('data', 'fsdp', 'tensor').
    tokenizer: the run's tokenizer.
    workdir: the run's folder, or None.
  """

  config: ml_collections.ConfigDict
  mesh: Mesh
  tokenizer: Tokenizer
  workdir: pathlib.Path | None = None
  _sources: dict = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )
  _records: dict = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )
  _memo: _Memo = dataclasses.field(
    default_factory=_Memo, init=False, repr=False, compare=False
  )

  @functools.cached_property
  def clips(self) -> Env:
    """The same for `config.clips`."""
    config = joint.of_clips(self.config)
    return Env(config, self.mesh, self.tokenizer, self.workdir)

  def source(self, split: str):
    """Opens a split once.

    'train', 'validation' and 'test' stand for `data.train_split`,
    `data.val_split` and `data.test_split`; any other name is the data's own.

    Raises:
      UserError: if the data has no such split.
    """
    data = self.config.data
    names = {
      "train": data.get("train_split", "train"),
      "validation": data.get("val_split", "validation"),
      "test": data.get("test_split", "test"),
    }
    name = names.get(split, split)
    if name not in self._sources:
      self._sources[name] = sources.open_source(data, name)
    return self._sources[name]

  def usable(
    self, split: str, max_examples: int, captioned: bool
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields what `_records.usable` does; each record is read once."""
    source, known = self.source(split), self._records.setdefault(split, {})
    clean = captions.cleaner(self.config.data) if captioned else None
    return _records.usable(source, known, max_examples, clean)

  def memo(self, params: Params, key, compute: Callable[[], Any]) -> Any:
    """Returns `compute()`, once for these parameters and this key."""
    return self._memo.get(params, key, compute)


class Evaluator:
  """Base of every evaluator.

  Attributes:
    needs: capabilities of the method without which it cannot run.
    annotations: fields of annotated records without which it cannot run.
    captioned: whether records without a caption are left out, and captions
      without a text, as in training. Damaged records are left out by all.
    fields: its own config fields beside `COMMON_FIELDS`, with defaults.
    method, config, env: as given.
  """

  needs: ClassVar[tuple[str, ...]] = ()
  annotations: ClassVar[tuple[str, ...]] = ()
  captioned: ClassVar[bool] = False
  fields: ClassVar[dict[str, Any]] = {}

  def __init__(self, method: Method, config, env: Env):
    self.method = method
    self.config = config
    self.env = env
    self.batch_size = padded_size(config.batch_size, env.mesh)

  def run(self, params: Params) -> dict[str, float]:
    """Returns metrics by name, without a prefix; shares lie in [0, 1]."""
    raise NotImplementedError

  @functools.cached_property
  def source(self) -> Subset:
    """The usable records, of the first `max_examples` if that is not 0."""
    return Subset(self.env.source(self.config.split), list(self._usable))

  @functools.cached_property
  def records(self) -> list[dict[str, Any]]:
    """The records of `source` without their pictures, read once."""
    return list(self._usable.values())

  @functools.cached_property
  def _usable(self) -> dict[int, dict[str, Any]]:
    """The usable records by their place in the split."""
    config = self.config
    return dict(
      self.env.usable(config.split, config.max_examples, self.captioned)
    )

  def has(self, capability: str) -> bool:
    """Tells whether the method can do something."""
    return hasattr(self.method, capability)

  def compiled(self, capability: str, **static) -> Callable:
    """Jits a capability of the method; the `static` arguments are bound."""
    return compiled(self.method, capability, self.env.mesh, **static)

  def on_images(
    self,
    function: Callable,
    params: Params,
    indices: Sequence[int] | None = None,
  ) -> np.ndarray:
    """Applies a jitted function to all pictures or some, `[N, ...]`."""
    source = self.source if indices is None else Subset(self.source, indices)
    batches = pipeline.eval_images(source, self.env.config, self.batch_size)
    return run_batches(function, params, batches, self.env.mesh)

  def on_pairs(
    self,
    function: Callable,
    params: Params,
    pairs: Sequence[tuple[int, str]],
  ) -> np.ndarray:
    """Applies a jitted function to (place of picture, text) pairs, `[N, ...]`.

    A picture is decoded once where its pairs follow one another.
    """
    read = functools.lru_cache(maxsize=1)(self.image)

    def batches():
      texts = self._text_batches([text for _, text in pairs])
      for start, batch in enumerate(texts):
        rows = pairs[start * self.batch_size :][: self.batch_size]
        image = np.stack([read(index) for index, _ in rows])
        yield batch | {"image": pad_rows(image, self.batch_size)}

    return run_batches(function, params, batches(), self.env.mesh)

  def image(self, index: int) -> np.ndarray:
    """Returns a picture, uint8 `[S, S, 3]`; black if it cannot be read."""
    data = self.env.config.data
    try:
      return pipeline.eval_image(self.source[index]["image"], data)
    except transforms.UnreadableImage:  # as in pipeline.eval_images
      return pipeline.blank_image(data)

  def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids `[N, L]` and lengths `[N]`, of texts as in training."""
    config = self.env.config
    clean = captions.cleaner(config.data)
    return self.env.tokenizer.encode_batch(
      [clean(text) for text in texts], config.tokenizer.max_len
    )

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids."""
    return decode(self.env.tokenizer, ids)

  def encode_images(self, params: Params) -> np.ndarray:
    """Embeds every picture of the split, `[N, E]`, once for these weights."""
    places = tuple(self._usable)
    key = ("images", self.method, self.config.split, places)
    encode = self.compiled("encode_image")
    return self.env.memo(params, key, lambda: self.on_images(encode, params))

  def encode_texts(self, params: Params, texts: Sequence[str]) -> np.ndarray:
    """Embeds texts, `[N, E]`, once for these weights and these texts."""
    key = ("texts", self.method, tuple(texts))
    encode, mesh = self.compiled("encode_text"), self.env.mesh
    return self.env.memo(
      params,
      key,
      lambda: run_batches(encode, params, self._text_batches(texts), mesh),
    )

  def _text_batches(self, texts) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(texts), self.batch_size):
      rows = list(texts[start : start + self.batch_size])
      text, text_len = self.tokenize(rows)
      yield {
        "text": pad_rows(text, self.batch_size),
        "text_len": pad_rows(text_len, self.batch_size),
        "mask": np.arange(self.batch_size) < len(rows),
      }


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
  """Returns the text of ids; a model may have more than the tokenizer."""
  return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


def choose_readout(kind: str, readout: str, method: Method) -> str:
  """Returns a readout of the method's maps; empty means the first.

  Raises:
    UserError: if it has none of that name; `kind` is the evaluator's type.
  """
  if readout and readout not in method.readouts:
    raise UserError(
      f"{kind}'s field readout is {readout!r}, but the method has "
      f"{', '.join(method.readouts)}"
    )
  return readout or method.readouts[0]


def available() -> list[str]:
  """Lists the evaluator types."""
  import vlp_jax.evaluators as package

  no_types = ("base", "pictures")
  names = [module.name for module in pkgutil.iter_modules(package.__path__)]
  return sorted(n for n in names if n not in no_types and n[0] != "_")


def build(name: str, eval_config, method: Method, env: Env) -> Evaluator:
  """Builds one evaluator and checks that it will be able to run.

  Args:
    name: its name in `config.evals`, for messages.
    eval_config: `config.evals.<name>`; missing fields take their defaults.
    method: what to evaluate.
    env: where.

  Raises:
    UserError: for an unknown type or field, a capability that the method
      lacks, or (`NotApplicableError`) data without the split or annotations.
  """
  kind = eval_config.get("type", "")
  if kind not in available():
    raise UserError(
      f"config.evals.{name}.type is {kind!r}, but the evaluators are "
      f"{', '.join(available())}"
    )
  evaluator = importlib.import_module(f"vlp_jax.evaluators.{kind}").Evaluator
  defaults = COMMON_FIELDS | evaluator.fields
  for field in eval_config:
    if field not in defaults:
      near = difflib.get_close_matches(field, defaults, 1, 0)[0]
      raise UserError(
        f"config.evals.{name}.{field} is no field of the evaluator {kind!r}; "
        f"did you mean {near!r}?"
      )
  config = ml_collections.ConfigDict(defaults | dict(eval_config.items()))
  lacks = [need for need in evaluator.needs if not hasattr(method, need)]
  if lacks:
    raise UserError(
      f"config.evals.{name} cannot evaluate the method "
      f"{env.config.method.name!r}, which lacks {', '.join(lacks)}; remove "
      f"evals.{name} from the config"
    )
  if config.clips:
    if not joint.has_clips(env.config):
      raise NotApplicableError(
        f"evals.{name} is left out: it needs clips, and neither "
        "config.clips.name nor source is set"
      )
    env = env.clips
  _check_data(name, config, evaluator, env)
  return evaluator(method, config, env)


def build_all(method: Method, env: Env) -> dict[str, Evaluator]:
  """Builds what `config.evals` names and the data can serve.

  Own data has neither annotated objects nor a split of unseen compositions;
  the evaluators that need them are left out, and a log line says so.
  """
  evaluators, left_out = {}, {}
  for name, eval_config in env.config.evals.items():
    try:
      evaluators[name] = build(name, eval_config, method, env)
    except NotApplicableError as error:
      left_out[name] = str(error)
  if left_out:
    # One line: nobody who brings data of their own has asked for these.
    logging.warning("evaluations left out: %s", ", ".join(left_out))
    for reason in left_out.values():
      logging.info("%s", reason)
  return evaluators


def _check_data(name: str, config, evaluator: type[Evaluator], env: Env):
  """Raises `NotApplicableError` unless the split can serve the evaluator."""
  try:
    source = env.source(config.split)
  except UserError as error:
    raise NotApplicableError(f"evals.{name} is left out: {error}") from error
  if evaluator.annotations and not source.annotated:
    raise NotApplicableError(
      f"evals.{name} is left out: it needs pictures with annotated objects, "
      f"and {source.name!r} has none"
    )
  if not len(source):
    raise NotApplicableError(
      f"evals.{name} is left out: split {config.split!r} is empty"
    )
  found = env.usable(config.split, config.max_examples, evaluator.captioned)
  _, first = next(found, (0, None))
  if first is None:
    raise NotApplicableError(
      f"evals.{name} is left out: no record of {source.name!r} is readable"
      + " and has a caption" * evaluator.captioned
    )
  lacks = [field for field in evaluator.annotations if field not in first]
  if lacks:
    raise NotApplicableError(
      f"evals.{name} is left out: it needs records with {', '.join(lacks)}, "
      f"and those of {source.name!r} have none"
    )
