"""python -m vlp_jax.data.tokenizer --name=NAME --vocab_size=32000

Trains a SentencePiece tokenizer on the captions of a data set.

  --name=NAME          a TFDS data set, or
  --source=FILE.jsonl  a list of pictures with captions
  --split=train        whose captions
  --vocab_size=32000   pieces at most; few captions have fewer
  --output=FILE.model  (default: beside the data, where training with the same
                       data and config.tokenizer.vocab_size finds it)
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlp_jax import command, flags
from vlp_jax.data import sources, tokenizer
from vlp_jax.errors import UserError

FLAGS = dict(name="", source="", split="train", vocab_size=32_000, output="")


def main(argv: Sequence[str]) -> None:
  """Runs the command; `argv` is without the program's name."""
  values = flags.parse_only_flags(argv, FLAGS, __doc__)
  if bool(values["name"]) == bool(values["source"]):
    raise UserError("give --name=NAME or --source=FILE.jsonl; see --help")
  if values["vocab_size"] < 1:
    raise UserError(f"--vocab_size={values['vocab_size']} is not positive")
  data = ConfigDict(
    dict(
      name=values["name"],
      source=values["source"],
      image_key="",
      caption_key="",
      num_frames=1,  # captions of clips as well as of pictures
    )
  )
  source = sources.open_source(data, values["split"])
  size, path = values["vocab_size"], None
  if values["output"]:
    path = pathlib.Path(values["output"]).expanduser()
    command.make_folder(path.parent)
    made = tokenizer.Tokenizer(tokenizer.train(source.captions(), size))
    tokenizer.write_atomically(path, made.model)
  else:
    made, path = tokenizer.trained_once(source, size)
    if path is None:
      raise UserError("the tokenizer could not be kept; give --output=FILE")
  print(f"{made.vocab_size:,} pieces from {source.name}, in {path}")
  print(
    f"--config.tokenizer.path={path} "
    f"--config.tokenizer.vocab_size={made.vocab_size}"
  )


def run() -> None:
  """Runs the command with this process's arguments, and exits."""
  command.execute(main)
