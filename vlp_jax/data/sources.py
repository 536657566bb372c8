"""Sources of image-caption records with random access.

`open_source(config.data, split)` opens, in this order of preference:

- `data.source`: a JSONL file read in place (see `jsonl.py`);
- `data.name` = `scenes` or `scenes_video`: the embedded data, generated at
  first use;
- `data.name`: any TFDS data set on disk that has a picture and a caption, as
  `name[/config][:version]` or the path of its folder.

With `data.num_frames`, records are clips: see `clips.py`.

Sources hold no open files when pickled, so that data workers can have them.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pathlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import grain
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from ml_collections import ConfigDict
from tensorflow_datasets.core import read_only_builder

from vlp_jax.data import builders, jsonl, splits, tfds_fields
from vlp_jax.data.warn import warn_skipped
from vlp_jax.errors import UserError

Record = dict[str, Any]


class UnreadableRecord(UserError):
  """A record whose bytes on disk are damaged."""

  def __init__(self, record: str, reason: object):
    """Makes the error.

    Args:
      record: what messages call it.
      reason: what the reader says.
    """
    super().__init__(record, " ".join(str(reason).split())[:200])

  def __str__(self) -> str:
    return f"{self.args[0]}: {self.reason}"

  @property
  def reason(self) -> str:
    """What is wrong, without the record's name."""
    return f"record cannot be read ({self.args[1]})"


class Source:
  """Records of one split.

  Attributes:
    name: what messages call it, such as `toy/1.0.0:train`.
    split: the split's name.
    directory: the folder beside the data, where derived files may be kept.
    fingerprint: name, version, split and number of records; for a JSONL file
      the hash of its bytes. Equal fingerprints, equal records.
    language: the module that reads the captions of annotated records and says
      whether they are true of a record's `objects`: `scenes_language` or
      `motion_language`. None where records tell no objects.
  """

  name: str
  split: str
  directory: pathlib.Path
  fingerprint: str
  language: ModuleType | None = None

  @property
  def annotated(self) -> bool:
    """Whether records tell their objects, as those of scenes do."""
    return self.language is not None

  def __len__(self) -> int:
    raise NotImplementedError

  def __getitem__(self, index: int) -> Record:
    """Returns record `index` with all that is known of it.

    Returns:
      `image`: encoded bytes, or a list of them, the frames of a clip;
      `captions`: list of str; `image_id`: int in [0, 2^31); and what else the
      source has: `label`, `category`, `keywords`, RefCOCO's `refs`, for scenes
      `objects`, `phrases`, `binding`, `relation`, and for scenes_video
      `objects`, `motion`, `binding`.

    Raises:
      UnreadableRecord: if the file is damaged there.
    """
    raise NotImplementedError

  def __iter__(self) -> Iterator[Record]:
    return (self[index] for index in range(len(self)))

  def pair(self, index: int) -> Record:
    """Returns `image`, `captions` and `image_id` only, as fast as may be."""
    return self[index]

  def describe(self, index: int) -> str:
    """Returns what a message calls record `index`."""
    return f"{self.name}[{index}]"

  def captions(self) -> Iterator[str]:
    """Yields the captions of all readable records, in order."""
    for index in range(len(self)):
      try:
        yield from self.pair(index)["captions"]
      except UnreadableRecord as e:
        warn_skipped(self.name, self.describe(index), e.reason)

  def order(self, seed: int) -> grain.MapDataset:
    """Returns indices of records for training, endless and random-access.

    Every epoch has its own order, in which each record comes exactly once.
    """
    return grain.MapDataset.range(len(self)).shuffle(seed=seed).repeat(None)

  def peers(self, index: int) -> range:
    """Returns the records of which one may stand in for record `index`."""
    del index
    return range(len(self))


class JsonlSource(Source):
  """The rows of one split of a JSONL file; see `jsonl.py` for the format."""

  def __init__(self, path: pathlib.Path, split: str):
    index = jsonl.read_index(path)
    split = splits.canonical(split)
    if split not in index.splits:
      raise UserError(
        f"{path} has no rows of split {split!r} ({_counts(index.counts())}); "
        f'give rows "split": "{split}", or choose another split with '
        "--config.data.{train,val,test}_split"
      )
    self._path = index.path
    rows, self._starts = index.records(split)
    self._offset = index.offset[rows]
    self._length = index.length[rows]
    self._image_id = index.image_id[rows]
    self.name = f"{path}:{split}"
    self.split = split
    self.directory = self._path.parent / ".vlp_jax"
    self.fingerprint = (
      f"{path.name}:{split}:{len(self)} records:sha256 {index.sha256[:32]}"
    )

  @functools.cached_property
  def _file(self) -> io.FileIO:
    return self._path.open("rb", buffering=0)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_file"}

  def __len__(self) -> int:
    return len(self._starts) - 1

  def _parse(self, index: int) -> list[jsonl.Row]:
    rows = range(self._starts[index], self._starts[index + 1])
    file = self._file.fileno()
    lines = (  # pread: threads share the file
      os.pread(file, int(self._length[r]), int(self._offset[r])) for r in rows
    )
    try:
      return [jsonl.parse(line) for line in lines]
    except (ValueError, OSError) as e:
      raise UserError(
        f"{self._path} changed while it was in use, or cannot be read"
      ) from e

  def __getitem__(self, index: int) -> Record:
    rows = self._parse(index)
    image = self._path.parent / rows[0].image
    try:
      data = image.read_bytes()
    except OSError:
      data = b""  # vanished since: as good as unreadable
    return {
      "image": data,
      "captions": [c for row in rows for c in row.captions],
      "image_id": int(self._image_id[self._starts[index]]),
      **rows[0].extra,
    }

  def describe(self, index: int) -> str:
    return str(self._path.parent / self._parse(index)[0].image)

  def captions(self) -> Iterator[str]:
    for index in range(len(self)):
      for row in self._parse(index):
        yield from row.captions


class TfdsSource(Source):
  """One split of a TFDS data set in ArrayRecord files."""

  def __init__(
    self,
    builder: tfds.core.DatasetBuilder,
    split: str,
    image_key: str = "",
    caption_key: str = "",
    to_record: str = "",
    clips: bool = False,
  ):
    """Opens a split.

    Args:
      builder: of a data set that is on disk.
      split: in TFDS's notation; `train[:90%]` is one, too.
      image_key: see `tfds_fields.find`.
      caption_key: see `tfds_fields.find`.
      to_record: module with a function `to_record(example) -> record` and a
        `LANGUAGE`, for data sets that tell more than a caption.
      clips: whether to read clips.
    """
    info = builder.info
    self._path = str(builder.data_path)
    self._fields = tfds_fields.find(
      info.features, info.full_name, image_key, caption_key, clips
    )
    self._to_record = to_record
    try:
      split_info = info.splits[split]
      self._length = split_info.num_examples
    except (KeyError, ValueError) as e:
      counts = ", ".join(
        f"{k}: {v.num_examples}" for k, v in info.splits.items()
      )
      raise UserError(
        f"data set {info.full_name} has no split {split!r} ({counts}); choose "
        "one, or part of one such as train[90%:], with "
        "--config.data.{train,val,test}_split"
      ) from e
    if not self._length:
      raise UserError(f"data set {info.full_name}: split {split!r} is empty")
    # Without ids of their own, pictures are numbered through all splits.
    before = [
      v.num_examples for k, v in sorted(info.splits.items()) if k < split
    ]
    self._first_id = sum(before) if split in info.splits else 0
    self.name = f"{info.full_name}:{split}"
    self.split = split
    self.directory = pathlib.Path(self._path)
    self.fingerprint = (
      f"{info.full_name}:{split}:{self._length} records:"
      f"{sum(v.num_bytes for v in info.splits.values())} bytes:"
      f"{self._fields.image}, {self._fields.caption}"
    )
    try:
      self._raw  # noqa: B018  opens it now, so that errors come at start-up
    except NotImplementedError as e:
      raise UserError(
        f"data set {info.full_name} is stored as {info.file_format.value}, "
        "which has no random access; write it again with "
        'file_format="array_record" (tfds build --file_format=array_record)'
      ) from e

  @property
  def language(self) -> ModuleType | None:
    """That of the module `to_record`; None without one."""
    if not self._to_record:
      return None
    return importlib.import_module(self._to_record).LANGUAGE

  @functools.cached_property
  def _builder(self) -> tfds.core.DatasetBuilder:
    return tfds.builder_from_directory(self._path)

  @functools.cached_property
  def _raw(self) -> Any:
    return self._builder.as_data_source(
      split=self.split,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )

  @functools.cached_property
  def _record_fn(self) -> Any:
    return importlib.import_module(self._to_record).to_record

  def __getstate__(self) -> dict[str, Any]:
    lazy = ("_builder", "_raw", "_record_fn")
    return {k: v for k, v in self.__dict__.items() if k not in lazy}

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    if not self._to_record:
      return self.pair(index)
    data = self._bytes(index)
    try:
      example = self._builder.info.features.deserialize_example_np(
        data, decoders={self._fields.image: tfds_fields.SkipDecoding()}
      )
    except DecodeError as e:
      raise UnreadableRecord(self.describe(index), e) from e
    return self._record_fn(example)

  def pair(self, index: int) -> Record:
    index = int(index)
    try:
      return self._fields.read(self._bytes(index), self._first_id + index)
    except DecodeError as e:
      raise UnreadableRecord(self.describe(index), e) from e

  def _bytes(self, index: int) -> bytes:
    try:
      return self._raw[index]
    except (RuntimeError, OSError) as e:  # as the reader raises
      raise UnreadableRecord(self.describe(index), e) from e


def open_source(data: ConfigDict, split: str) -> Source:
  """Opens the split of the data set that `config.data` names.

  Raises:
    UserError: if the data set or the split does not exist, or has no pictures
      or captions; the message says where it was sought and how to make one.
  """
  if data.source:
    return JsonlSource(jsonl.find(data.source), split)
  clips = data.num_frames > 0
  base = data.name.split("/")[0].split(":")[0]
  if base in builders.EMBEDDED:
    module = importlib.import_module(f"{builders.__name__}.{base}")
    builder = module.ensure_built(data.name, data_dir())
    return TfdsSource(builder, split, to_record=module.__name__, clips=clips)
  builder = _find_builder(data.name)
  return TfdsSource(
    builder, split, data.image_key, data.caption_key, clips=clips
  )


def data_dir() -> pathlib.Path:
  """Returns where TFDS data sets are: $TFDS_DATA_DIR, or TFDS's default."""
  path = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(path).expanduser()


def _find_builder(name: str) -> tfds.core.DatasetBuilder:
  """Opens a data set from its files alone, without its generating code."""
  folder = pathlib.Path(name).expanduser()
  try:
    if (folder / "dataset_info.json").is_file():
      return tfds.builder_from_directory(folder)
    return read_only_builder.builder_from_files(name, data_dir=str(data_dir()))
  except (ValueError, OSError) as e:  # not found; or not a possible name
    make = builders.command(name) or (
      "python -m vlp_jax.data.prepare --source=PATH --name=NAME, or read a "
      "list in place with --config.data.source=FILE.jsonl"
    )
    raise UserError(
      f"no data set {name!r} in {data_dir()}; set TFDS_DATA_DIR to where it "
      f"is, or make it with {make}"
    ) from e


def _counts(counts: dict[str, int]) -> str:
  return ", ".join(f"{name}: {count}" for name, count in counts.items())
