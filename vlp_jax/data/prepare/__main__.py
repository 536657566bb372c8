"""python -m vlp_jax.data.prepare --source=PATH --name=NAME

Writes a TFDS data set (ArrayRecord) of `image` (of clips, `frames`), `captions`
and `image_id`, which every command then reads as `--config.data.name=NAME`.

  --source=PATH          a folder of pictures with .txt captions beside them, or
                         with a metadata.jsonl or .csv; a .jsonl, .csv, .tsv or
                         .parquet list; webdataset .tar shards. `*` and
                         {00000..00099} stand for several files, and
                         train=PATH,test=PATH gives each split its own
  --name=NAME            of the data set
  --data_dir=DIR         where data sets are; else $TFDS_DATA_DIR
  --splits=COLUMN        the column that names the split; or shares such as
                         train:0.9,validation:0.05,test:0.05, drawn by a hash of
                         the image's id
  --image_column=NAME    and --caption_column, --id_column: where they are not
                         found by their usual names; pictures in files go by
                         their paths unless --id_column is given
  --keep=A,B             other columns to keep
  --image_size=N         reduce larger pictures to a shorter side of N pixels
  --num_frames=N         the source holds clips (.mp4, .webm, .gif, ..., or
                         folders of frames): keep N frames of each
  --min_side=8           skip pictures with a shorter side than that
  --max_bad=1%           give up when more of the source has to be skipped
  --num_workers=N        processes; one a core, if not given
  --records_per_shard=N  about how many records a file holds
  --overwrite            replace a data set of the same name
  --beam_options=A,B     run on Apache Beam with these of its options, such as
                         runner=DirectRunner,direct_num_workers=4

Killed and started again, it goes on from the finished shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlp_jax import command, flags
from vlp_jax.data.prepare import run
from vlp_jax.errors import UserError

FLAGS = {
  "source": "",
  "name": "",
  "data_dir": "",
  "splits": "",
  "image_column": "",
  "caption_column": "",
  "id_column": "",
  "keep": "",
  "image_size": 0,
  "num_frames": 0,
  "min_side": 8,
  "max_bad": "1%",
  "num_workers": 0,
  "records_per_shard": 1000,
  "overwrite": False,
  "beam_options": "",
}


def main(argv: Sequence[str]) -> None:
  """Runs the command; `argv` is without the program's name."""
  values = flags.parse_only_flags(argv, FLAGS, __doc__)
  values["max_bad"] = _share(values["max_bad"])
  beam_options = values.pop("beam_options")
  options = run.Options(**values)
  if beam_options:
    from vlp_jax.data.prepare import beam

    beam.prepare(options, beam_options.split(","))
  else:
    run.prepare(options)


def _share(text: str) -> float:
  """Reads `1%` or `0.01`."""
  try:
    percent = text.endswith("%")
    share = float(text.removesuffix("%")) / (100 if percent else 1)
  except ValueError:
    share = math.nan
  if not 0 <= share <= 1:
    raise UserError(f"--max_bad={text}: it is a share such as 1% or 0.01")
  return share


if __name__ == "__main__":
  command.execute(main)
