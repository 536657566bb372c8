"""Pass two on Apache Beam, where one machine is too small for the pictures.

Entries are read, checked and made into records by the same functions as on
one machine; TFDS's Beam support writes them, in the same order. The source and
the data directory are on a file system that all workers share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from vlp_jax.data.prepare import report, run, shards
from vlp_jax.data.prepare.entries import Tally
from vlp_jax.data.prepare.records import Schema
from vlp_jax.data.prepare.table import Shard
from vlp_jax.errors import UserError


def prepare(options: run.Options, beam_options: Sequence[str]) -> None:
  """Makes the data set, and prints what became of the source.

  Args:
    options: as for `run.prepare`; `num_workers` is Beam's to choose, and the
      number of files TFDS's.
    beam_options: `name=value` each, as Beam calls them.

  Raises:
    UserError: as `run.prepare`; or if Beam is not installed, or an option
      unknown to it.
  """
  try:
    from apache_beam.options import pipeline_options
  except ImportError as e:
    raise UserError(
      "--beam_options needs Apache Beam: pip install 'vlp_jax[beam]'"
    ) from e
  parsed = pipeline_options.PipelineOptions.from_dictionary(
    dict(_pair(option) for option in beam_options)
  )
  run.prepare(options, functools.partial(_write, beam_options=parsed))


def _pair(option: str) -> tuple[str, str]:
  name, equals, value = option.partition("=")
  if not equals:
    raise UserError(
      f"--beam_options: {option!r} is not of the form name=value, as in "
      "runner=DirectRunner,direct_num_workers=4"
    )
  return name.removeprefix("--"), value


def _write(
  options: run.Options,
  plan: run.Plan,
  scratch: pathlib.Path,
  beam_options: Any,
) -> Tally:
  """Makes the data set of a plan; what `run.prepare` calls."""
  made = type(
    "Prepared", (_Prepared,), {"name": options.name}, skip_registration=True
  )
  builder = made(options, plan, scratch)
  if options.folder.exists():
    shutil.rmtree(options.folder)
  config = tfds.download.DownloadConfig(beam_options=beam_options)
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS's announcements
    builder.download_and_prepare(
      download_dir=scratch / "downloads", download_config=config
    )
  return builder.total


class _Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder whose examples come from a plan."""

  VERSION = tfds.core.Version(run.VERSION)
  url_infos = {}  # noqa: RUF012 - TFDS's protocol

  def __init__(
    self, options: run.Options, plan: run.Plan, scratch: pathlib.Path
  ):
    self._options, self._plan, self._scratch = options, plan, scratch
    self._schema = options.schema(plan.kinds)
    super().__init__(
      data_dir=str(options.folder.parent.parent), file_format="array_record"
    )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=self._schema.features(),
      description=self._options.description,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    names = sorted({shard.split for shard in self._plan.shards})
    return {name: self._generate_examples(name) for name in names}

  def _generate_examples(self, split: str) -> Any:
    """Returns Beam's transform that makes the examples of a split."""
    import apache_beam as beam

    read = functools.partial(
      _examples, folder=self._scratch, schema=self._schema
    )
    found = [shard for shard in self._plan.shards if shard.split == split]
    return beam.Create(found) | beam.Reshuffle() | beam.FlatMap(read)

  def _download_and_prepare(
    self, dl_manager: Any, download_config: Any
  ) -> None:
    super()._download_and_prepare(dl_manager, download_config)
    self.total = self._plan.tally.copy()
    for shard in self._plan.shards:
      note = json.loads(_note(self._scratch, shard).read_text())
      self.total.add(Tally(**note))
    report.check(self.total, self._options.max_bad)
    path = pathlib.Path(self.data_dir, report.NAME)
    report.write(path, self._options, self.total)


def _examples(
  shard: Shard, folder: pathlib.Path, schema: Schema
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (image id, record), and leaves a note of what was skipped."""
  tally = Tally()
  for _, record in shards.examples(shard, folder / run.TABLE, schema, tally):
    yield record["image_id"], record
  _note(folder, shard).write_text(json.dumps(dataclasses.asdict(tally)))


def _note(folder: pathlib.Path, shard: Shard) -> pathlib.Path:
  return folder / f"beam-{shard.split}-{shard.index:05d}.json"
