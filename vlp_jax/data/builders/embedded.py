"""Data sets that come with the code: made at first use, without a network.

A builder of such a data set takes its examples from a module that has `SPECS`
(configurations by name), `SPLITS` and `example`: see `generation.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from vlp_jax.data import generation
from vlp_jax.errors import UserError


class EmbeddedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Base of builders of embedded data sets.

  Attributes:
    GENERATOR: the module that makes the examples.
    DESCRIPTION: one sentence.
    PICTURES: the feature of its pictures: `image`, or `frames` of clips.
    ANNOTATIONS: names of an example's annotations, which are kept as JSON
      texts: they are written, and above all read, more than twice as fast as
      nested TFDS sequences.
    UNIT: what an example is called, in the plural.
    DEFAULT: the configuration that the data set's name alone stands for.
    on_example: called once for each example that is made, without arguments.
  """

  VERSION = tfds.core.Version("1.0.0")
  GENERATOR: ClassVar[ModuleType]
  DESCRIPTION: ClassVar[str]
  PICTURES = "image"
  ANNOTATIONS: ClassVar[tuple[str, ...]]
  UNIT = "pictures"
  DEFAULT = "px64"
  # Nothing is downloaded; TFDS looks for checksums beside the code otherwise,
  # with a package (importlib_resources) that it does not ask for.
  url_infos = {}  # noqa: RUF012

  def on_example(self) -> None:
    """Does nothing; replaced by who wants to know."""

  @property
  def spec(self) -> generation.Spec:
    """The configuration, as the generator has it."""
    return self.GENERATOR.SPECS[self.builder_config.name]

  def _info(self) -> tfds.core.DatasetInfo:
    size, text = self.spec.image_size, tfds.features.Text
    picture = tfds.features.Image(shape=(size, size, 3), encoding_format="png")
    if self.PICTURES == "frames":
      picture = tfds.features.Sequence(picture)
    annotation = text(doc="JSON, see docs/scenes.md")
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          self.PICTURES: picture,
          "image_id": np.int32,
          "captions": tfds.features.Sequence(text()),
          **dict.fromkeys(self.ANNOTATIONS, annotation),
        }
      ),
      disable_shuffling=True,  # examples, or pairs, are independent draws
    )

  @classmethod
  def to_features(cls, example: Mapping[str, Any]) -> dict[str, Any]:
    """Turns an example of the generator into what TFDS stores."""
    return {
      cls.PICTURES: example["image"],
      "image_id": example["image_id"],
      "captions": example["captions"],
      **{name: json.dumps(example[name]) for name in cls.ANNOTATIONS},
    }

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded
    return {
      split: self._generate_examples(split) for split in self.GENERATOR.SPLITS
    }

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    made = generation.examples(
      self.GENERATOR.__name__, self.builder_config.name, split
    )
    for key, example in enumerate(made):
      yield key, self.to_features(example)
      self.on_example()


def told(example: Mapping[str, Any], annotations: Sequence[str]) -> dict:
  """Returns what TFDS has read of an example, beside its pictures.

  Args:
    example: of the data source.
    annotations: names of the JSON texts.

  Returns:
    `image_id` (int), `captions` (list of str), and the annotations.
  """
  return {
    "image_id": int(example["image_id"]),
    "captions": [caption.decode() for caption in example["captions"]],
    **{name: json.loads(example[name]) for name in annotations},
  }


def configs(generator: ModuleType) -> list[tfds.core.BuilderConfig]:
  """Returns the configurations of a generator, as TFDS wants them."""
  return [
    tfds.core.BuilderConfig(name=name, description=spec.description)
    for name, spec in generator.SPECS.items()
  ]


def ensure_built(
  kind: type[EmbeddedBuilder], name: str, data_dir: str | None = None
) -> EmbeddedBuilder:
  """Returns the builder of a configuration, making its data if need be.

  The data are made aside and renamed when complete, so that a process that is
  killed leaves nothing that looks like data; processes that come at the same
  time wait for the first.

  Args:
    kind: the data set's builder.
    name: its name, or `name/<config>`; `:1.0.0` may follow.
    data_dir: TFDS's directory; else $TFDS_DATA_DIR, else TFDS's default.

  Raises:
    UserError: if there is no such configuration or version, or if the
      directory cannot be written.
  """
  config, data_dir = _parse_name(kind, name), _data_dir(data_dir)
  with _quiet():
    builder = _builder(kind, config, data_dir)
    if builder.is_prepared():
      return builder
    try:
      with _locked(_lock_file(kind, config, data_dir)) as locked:
        builder = _builder(kind, config, data_dir)  # another may have made it
        if not builder.is_prepared():
          if locked:
            _remove_leftovers(builder)
          _build(builder)
    except OSError as error:
      raise UserError(
        f"cannot make the data set {name} in {data_dir}: {error}; set "
        "TFDS_DATA_DIR to a directory that can be written"
      ) from error
  return builder


def _data_dir(data_dir: str | None) -> str:
  # TFDS reads the variable when it is imported, which may have been long ago.
  chosen = data_dir or os.environ.get("TFDS_DATA_DIR")
  return os.path.expanduser(chosen or "~/tensorflow_datasets")


def _lock_file(
  kind: type[EmbeddedBuilder], config: str, data_dir: str
) -> pathlib.Path:
  return pathlib.Path(data_dir, f".{kind.name}-{config}.lock")


def _parse_name(kind: type[EmbeddedBuilder], name: str) -> str:
  """Returns the configuration that a data set's name asks for."""
  base, _, version = name.partition(":")
  base, _, config = base.partition("/")
  config, known = config or kind.DEFAULT, kind.GENERATOR.SPECS
  if base != kind.name or config not in known:
    raise UserError(
      f"there is no data set {name!r}; there are "
      + ", ".join([kind.name, *(f"{kind.name}/{c}" for c in known)])
    )
  if version not in ("", str(kind.VERSION)):
    raise UserError(
      f"data set {name!r}: only version {kind.VERSION} can be made"
    )
  return config


def _builder(
  kind: type[EmbeddedBuilder], config: str, data_dir: str
) -> EmbeddedBuilder:
  return kind(config=config, data_dir=data_dir, file_format="array_record")


def _remove_leftovers(builder: EmbeddedBuilder) -> None:
  """Removes what builds that were killed have left; the caller has the lock."""
  path = pathlib.Path(builder.data_dir)
  for left in path.parent.glob(f"incomplete.*_{path.name}"):
    shutil.rmtree(left, ignore_errors=True)


def _build(builder: EmbeddedBuilder) -> None:
  total = sum(map(builder.spec.num_examples, builder.GENERATOR.SPLITS))
  with _progress(builder, total):
    try:
      builder.download_and_prepare()
    except OSError:
      # Where files cannot be locked, another process may have been first.
      if not builder.is_prepared():
        raise


@contextlib.contextmanager
def _progress(builder: EmbeddedBuilder, total: int) -> Iterator[None]:
  """Says on one line of stderr what is being made, and how long it took."""
  head = (
    f"{builder.name}/{builder.builder_config.name}: drawing {total:,} "
    f"{builder.UNIT} into {builder.data_dir} ... "
  )
  terminal = sys.stderr.isatty()
  start = shown = time.monotonic()
  done = 0

  def count() -> None:
    nonlocal done, shown
    done += 1
    if terminal and time.monotonic() - shown > 0.1:
      shown = time.monotonic()
      sys.stderr.write(f"\r{head}{done / total:4.0%}")
      sys.stderr.flush()

  builder.on_example = count
  sys.stderr.write(head)
  sys.stderr.flush()
  end = "stopped"
  try:
    yield
    end = f"{time.monotonic() - start:.1f} s"
  finally:
    sys.stderr.write((f"\r{head}" if terminal else "") + end + "\n")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Holds back what TFDS itself logs, prints, and draws bars of."""
  from tensorflow_datasets.core.utils import tqdm_utils

  bars, verbosity = tqdm_utils._active, logging.get_verbosity()
  tqdm_utils.display_progress_bar(False)
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tqdm_utils.display_progress_bar(bars)
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
  """Holds an exclusive lock, which the system lets go if we are killed.

  Yields whether there is one: some file systems and systems know no locks.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    try:
      import fcntl

      fcntl.flock(file, fcntl.LOCK_EX)
      locked = True
    except (ImportError, OSError):
      locked = False
    yield locked
