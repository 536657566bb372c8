"""Reads vocabulary files of other projects, from the disk alone.

| file | kind |
|---|---|
| `*.model` | SentencePiece |
| `vocab.txt` | WordPiece (BERT); lower-casing unless it has capitals |
| `bpe_simple_vocab_16e6.txt.gz` | byte-level BPE of OpenAI's CLIP |
| `vocab.json` with `merges.txt` beside it | byte-level BPE: CLIP, RoBERTa |
| `tokenizer.json` | any of Hugging Face's that has a start and an end symbol |

A run's `tokenizer.model`, which is of the kinds of `token_codecs.py`, is one
more.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Sequence

from tokenizers import pre_tokenizers

from vlp_jax.errors import UserError

_CLIP_MERGES = 49152 - 256 - 2  # the file of OpenAI's has more than are used
_CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_CAPITAL = re.compile("[A-Z]")
_KINDS = (
  "it is neither a vocab.txt, a vocab.json with its merges.txt, a "
  "tokenizer.json nor bpe_simple_vocab_16e6.txt.gz"
)


def read(path: pathlib.Path) -> bytes:
  """Returns the model to keep, as `token_codecs.open_codec` reads it.

  Raises:
    OSError: if a file cannot be read.
    UserError: if a second file is missing, or a file is damaged or of no
      known kind. (A file that may be SentencePiece's is not looked into.)
  """
  data = path.read_bytes()
  if data.startswith(b"\x1f\x8b"):
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
      raise UserError(f"a damaged .gz file ({e})") from e
  if data.startswith(b"{"):
    return _read_json(path, data)
  first = data[:200].split(b"\n")[0]
  if b"#version" in first:
    return _clip(_lines(data)[1:])
  if path.suffix == ".txt":
    return _wordpiece(_lines(data))
  return data


def _read_json(path: pathlib.Path, data: bytes) -> bytes:
  try:
    content = json.loads(data)
  except ValueError as e:
    raise UserError(f"not JSON ({e})") from e
  if isinstance(content.get("model"), dict) or "type" in content:
    return data
  if not all(isinstance(number, int) for number in content.values()):
    raise UserError(f"JSON of unknown kind: {_KINDS}")
  vocab = sorted(content, key=content.__getitem__)
  if [content[piece] for piece in vocab] != list(range(len(vocab))):
    raise UserError("its ids are not 0, 1, 2, ... without a gap")
  merges = path.with_name(path.name.replace("vocab.json", "merges.txt"))
  if merges == path or not merges.is_file():
    merges = path.with_name("merges.txt")
    raise UserError(f"a vocab.json needs its merges beside it: no {merges}")
  kind = "clip" if any(piece.endswith("</w>") for piece in vocab) else "roberta"
  lines = _lines(merges.read_bytes())
  lines = lines[1:] if lines and lines[0].startswith("#version") else lines
  return _kept(type=kind, vocab=vocab, merges=_merges(lines, merges.name))


def _clip(lines: Sequence[str]) -> bytes:
  """Makes CLIP's vocabulary of its merges alone, as OpenAI's code does."""
  lines = lines[:_CLIP_MERGES]
  if not any(line.endswith("</w>") for line in lines):
    raise UserError(
      "these are merges without </w>, so not CLIP's; name the vocab.json "
      "beside them instead"
    )
  merges = _merges(lines, "the file")
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
  vocab += [merge.replace(" ", "") for merge in merges]
  return _kept(type="clip", vocab=[*vocab, *_CLIP_SPECIALS], merges=merges)


def _wordpiece(lines: Sequence[str]) -> bytes:
  missing = [name for name in ("[CLS]", "[SEP]", "[UNK]") if name not in lines]
  if len(missing) == 3:
    raise UserError(f"a file of unknown kind: {_KINDS}")
  if missing:
    raise UserError(f"the vocabulary has no {' and no '.join(missing)}")
  pieces = (p for p in lines if not (p.startswith("[") and p.endswith("]")))
  lowercase = not any(map(_CAPITAL.search, pieces))
  return _kept(type="wordpiece", vocab=list(lines), lowercase=lowercase)


def _lines(data: bytes) -> list[str]:
  """Splits at line ends only: U+2028 and the like may be pieces."""
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise UserError(f"not UTF-8 text ({e.reason}): {_KINDS}") from e
  lines = text.replace("\r\n", "\n").split("\n")
  return lines[:-1] if not lines[-1] else lines


def _merges(lines: Sequence[str], name: str) -> list[str]:
  for number, line in enumerate(lines, 1):
    if len(line.split(" ")) != 2:
      raise UserError(f"{name}: merge {number} is not two pieces: {line!r}")
  return list(lines)


def _kept(**spec) -> bytes:
  """Writes what `token_codecs.py` describes, always in the same way."""
  text = json.dumps(
    spec, ensure_ascii=False, sort_keys=True, separators=(",", ":")
  )
  return text.encode()
