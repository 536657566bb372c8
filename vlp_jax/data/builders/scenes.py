"""`scenes`: the embedded data set, as a TFDS builder that needs no network.

docs/scenes.md says what is in it. Annotations are kept as JSON texts: they are
written, and above all read, more than twice as fast as nested TFDS sequences.
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
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from vlp_jax.data import scenes_generate
from vlp_jax.errors import UserError

_ANNOTATIONS = ("objects", "phrases", "binding", "relation")
_DEFAULT = "px64"


class Scenes(tfds.core.GeneratorBasedBuilder):
  """Builder of `scenes`: coloured shapes, captions, boxes and probes.

  Attributes:
    on_example: called once for each example that is made, without arguments.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS's protocol
    tfds.core.BuilderConfig(name=name, description=spec.description)
    for name, spec in scenes_generate.SPECS.items()
  ]
  DEFAULT_BUILDER_CONFIG_NAME = _DEFAULT
  # Nothing is downloaded; TFDS looks for checksums beside the code otherwise,
  # with a package (importlib_resources) that it does not ask for.
  url_infos = {}  # noqa: RUF012

  def on_example(self) -> None:
    """Does nothing; replaced by who wants to know."""

  def _info(self) -> tfds.core.DatasetInfo:
    size = scenes_generate.SPECS[self.builder_config.name].image_size
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description="Pictures of coloured shapes with captions that are true.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(size, size, 3), encoding_format="png"
          ),
          "image_id": np.int32,
          "captions": tfds.features.Sequence(text()),
          **{
            name: text(doc="JSON, see docs/scenes.md") for name in _ANNOTATIONS
          },
        }
      ),
      disable_shuffling=True,  # examples are independent draws already
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded
    return {
      split: self._generate_examples(split) for split in scenes_generate.SPLITS
    }

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    made = scenes_generate.examples(self.builder_config.name, split)
    for key, example in enumerate(made):
      yield key, to_features(example)
      self.on_example()


def to_features(example: Mapping[str, Any]) -> dict[str, Any]:
  """Turns an example of `scenes_generate` into what TFDS stores."""
  texts = {name: json.dumps(example[name]) for name in _ANNOTATIONS}
  return {**example, **texts}


def to_record(example: Mapping[str, Any]) -> dict[str, Any]:
  """Turns an example that TFDS has read into a record.

  Args:
    example: from `builder.as_data_source(split, decoders={"image":
      tfds.decode.SkipDecoding()})`.

  Returns:
    `image` (PNG bytes), `image_id` (int), `captions` (list of str), `objects`,
    `phrases`, `binding` and `relation` (lists of dicts, see docs/scenes.md).
  """
  return {
    "image": example["image"],
    "image_id": int(example["image_id"]),
    "captions": [caption.decode() for caption in example["captions"]],
    **{name: json.loads(example[name]) for name in _ANNOTATIONS},
  }


def ensure_built(name: str = "scenes", data_dir: str | None = None) -> Scenes:
  """Returns the builder of a configuration, making its data if need be.

  The data are made aside and renamed when complete, so that a process that is
  killed leaves nothing that looks like data; processes that come at the same
  time wait for the first.

  Args:
    name: `scenes`, or `scenes/<config>`; `:1.0.0` may follow.
    data_dir: TFDS's directory; else $TFDS_DATA_DIR, else TFDS's default.

  Raises:
    UserError: if there is no such configuration or version, or if the
      directory cannot be written.
  """
  config, data_dir = _parse_name(name), _data_dir(data_dir)
  with _quiet():
    builder = _builder(config, data_dir)
    if builder.is_prepared():
      return builder
    try:
      with _locked(pathlib.Path(data_dir, f".scenes-{config}.lock")) as locked:
        builder = _builder(config, data_dir)  # another may have made it
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


def _parse_name(name: str) -> str:
  """Returns the configuration that a data set's name asks for."""
  base, _, version = name.partition(":")
  base, _, config = base.partition("/")
  config = config or _DEFAULT
  if base != "scenes" or config not in scenes_generate.SPECS:
    raise UserError(
      f"there is no data set {name!r}; there are "
      + ", ".join(["scenes", *(f"scenes/{c}" for c in scenes_generate.SPECS)])
    )
  if version not in ("", str(Scenes.VERSION)):
    raise UserError(
      f"data set {name!r}: only version {Scenes.VERSION} can be made"
    )
  return config


def _builder(config: str, data_dir: str) -> Scenes:
  return Scenes(config=config, data_dir=data_dir, file_format="array_record")


def _remove_leftovers(builder: Scenes) -> None:
  """Removes what builds that were killed have left; the caller has the lock."""
  path = pathlib.Path(builder.data_dir)
  for left in path.parent.glob(f"incomplete.*_{path.name}"):
    shutil.rmtree(left, ignore_errors=True)


def _build(builder: Scenes) -> None:
  spec = scenes_generate.SPECS[builder.builder_config.name]
  total = sum(map(spec.num_examples, scenes_generate.SPLITS))
  with _progress(builder, total):
    try:
      builder.download_and_prepare()
    except OSError:
      # Where files cannot be locked, another process may have been first.
      if not builder.is_prepared():
        raise


@contextlib.contextmanager
def _progress(builder: Scenes, total: int) -> Iterator[None]:
  """Says on one line of stderr what is being made, and how long it took."""
  head = (
    f"scenes/{builder.builder_config.name}: drawing {total:,} pictures "
    f"into {builder.data_dir} ... "
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
