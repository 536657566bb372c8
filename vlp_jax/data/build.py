"""python -m vlp_jax.data.build --name=NAME --manual_dir=DIR

Builds one of the data sets in docs/datasets.md from its owners' files.

  --name=NAME         of the data set
  --manual_dir=DIR    where the files are that its owners hand out
  --data_dir=DIR      where data sets are kept (default: $TFDS_DATA_DIR, or
                      ~/tensorflow_datasets)

Commands then read it as `--config.data.name=NAME`. What cannot be used is left
out, counted on stderr, and named in skipped.json beside the data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import pathlib
import sys
from collections.abc import Sequence

import tensorflow_datasets as tfds

from vlp_jax import command
from vlp_jax.data import builders, sources
from vlp_jax.errors import UserError
from vlp_jax.flags import did_you_mean, parse_only_flags

FLAGS = dict(name="", manual_dir="", data_dir="")
# What TFDS's own builders need, and nothing else here does.
_NEEDED_BY_TFDS = ("tensorflow", "importlib_resources")


def main(argv: Sequence[str]) -> None:
  """Reads the command line and builds."""
  flags = parse_only_flags(argv, FLAGS, __doc__)
  logging.getLogger("absl").setLevel(logging.ERROR)  # folders that are new
  build(flags["name"], flags["manual_dir"], flags["data_dir"])


def build(
  name: str, manual_dir: str = "", data_dir: str = ""
) -> tfds.core.DatasetBuilder:
  """Builds a data set where it is not built yet, and says what it has.

  Args:
    name: `name` or `name/config`.
    manual_dir: of the owners' files.
    data_dir: of data sets; else TFDS's.

  Raises:
    UserError: if the name is unknown, or files are missing or unusable.
  """
  folder = pathlib.Path(data_dir) if data_dir else sources.data_dir()
  builder = _builder(name, str(folder.expanduser()))
  if builder.is_prepared():
    print(f"{name} is there already; to build it again, remove its folder")
  else:
    needs_files = builder.MANUAL_DOWNLOAD_INSTRUCTIONS is not None
    if needs_files and not manual_dir:
      raise UserError(
        f"--manual_dir=DIR is missing: a folder with "
        f"{' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())}"
      )
    _prepare(builder, str(pathlib.Path(manual_dir).expanduser()))
  splits = builder.info.splits.items()
  counts = ", ".join(f"{k}: {v.num_examples:,}" for k, v in splits)
  print(f"{builder.data_dir} ({counts})")
  return builder


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  options = dict(data_dir=data_dir, file_format="array_record")
  if name in builders.OF_TFDS:
    return tfds.builder(name, **options)
  known = builders.constructors()
  if name not in known:
    names = [*known, *builders.OF_TFDS]
    raise UserError(
      f"there is no data set {name!r} to build; there are "
      f"{', '.join(names)}{did_you_mean(name, names)}"
    )
  return known[name](**options)


def _prepare(builder: tfds.core.DatasetBuilder, manual_dir: str) -> None:
  if builder.name in builders.OF_TFDS:
    lacking = [p for p in _NEEDED_BY_TFDS if not importlib.util.find_spec(p)]
    if lacking:
      raise UserError(
        f"building {builder.name} (not reading it) needs packages: pip install "
        f"{' '.join(lacking)}; or build it on another machine and copy "
        f"{builder.data_dir}"
      )
  print(f"{builder.name}: to {builder.data_dir}", file=sys.stderr)
  config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS's announcements
      builder.download_and_prepare(download_config=config)
  except AssertionError as e:  # TFDS: there is no such folder, or an empty one
    raise UserError(f"{builder.name}: {e}") from e


if __name__ == "__main__":
  command.execute(main)
