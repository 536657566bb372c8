"""A SentencePiece tokenizer, given or trained on the captions at first use.

Texts become `[SOT] pieces [EOT] pad pad ...`. Padding is 0 whatever the model,
since `text_len` says what counts.

A trained model (byte-pair encoding, lower-cased NFKC) is kept beside the data,
under a name with the vocabulary's size and a hash of the data and of how it was
trained, so that changed captions make another. Training is deterministic.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from absl import logging
from ml_collections import ConfigDict

from vlp_jax.data.sources import Source, open_source
from vlp_jax.data.warn import warn
from vlp_jax.errors import UserError

PAD, UNK, SOT, EOT = 0, 1, 2, 3

_MAX_CAPTIONS = 1_000_000  # more make no better vocabulary
_MAX_CHARS = 1000  # of a caption, in training
# From this size on, the 256 byte pieces that spell any rare character are
# affordable; a smaller vocabulary holds every character of its captions.
_BYTES_FROM = 1024
_CHECKED = 2000  # captions whose length is looked at
_TRAINER = dict(
  # Few different words, as in synthetic captions, become pieces of their own;
  # unigram would spell those that have no substring in common with another.
  model_type="bpe",
  normalization_rule_name="nmt_nfkc_cf",
  hard_vocab_limit=False,
  pad_id=PAD,
  unk_id=UNK,
  bos_id=SOT,
  eos_id=EOT,
  num_threads=4,  # fixed: sums depend on it
)


class Tokenizer:
  """Encodes texts with a SentencePiece model; picklable.

  Attributes:
    vocab_size: number of pieces, the four special ones included.
    sha256: of the model.
    pad_id, unk_id, bos_id, eos_id: special ids; bos is SOT and eos is EOT.
  """

  def __init__(self, model: bytes):
    """Makes a tokenizer of a serialised model.

    Raises:
      UserError: if it is no SentencePiece model, or has no BOS or EOS.
    """
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.vocab_size = self._processor.GetPieceSize()
    except (RuntimeError, OSError, ValueError) as e:
      raise UserError("not a SentencePiece model") from e
    if not self.vocab_size:
      raise UserError("not a SentencePiece model")
    self._model = model
    self.sha256 = hashlib.sha256(model).hexdigest()
    self.pad_id = PAD
    self.unk_id = self._processor.unk_id()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    if min(self.bos_id, self.eos_id) < 0:
      raise UserError(
        "the model has no BOS or no EOS piece, and captions need both; train "
        "it with --bos_id and --eos_id of at least 0"
      )

  def __reduce__(self):
    return Tokenizer, (self._model,)

  @property
  def model(self) -> bytes:
    """The serialised model: what a `.model` file holds."""
    return self._model

  def encode(self, text: str, max_len: int) -> tuple[np.ndarray, int]:
    """Returns (ids int32 `[max_len]`, number of ids before the pads).

    A longer text is cut; the last id that is kept is then EOT.
    """
    ids = self._processor.EncodeAsIds(text)
    ids = [self.bos_id, *ids[: max_len - 2], self.eos_id]
    padded = np.full(max_len, PAD, np.int32)
    padded[: len(ids)] = ids
    return padded, len(ids)

  def length(self, text: str) -> int:
    """Returns the number of ids of a text that is not cut."""
    return len(self._processor.EncodeAsIds(text)) + 2

  def encode_batch(
    self, texts: Sequence[str], max_len: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids int32 `[N, max_len]`, lengths int32 `[N]`)."""
    ids = np.full((len(texts), max_len), PAD, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      ids[row], lengths[row] = self.encode(text, max_len)
    return ids, lengths

  def pieces(self, text: str) -> list[tuple[str, int, int]]:
    """Returns (piece, start, end) for the ids between SOT and EOT.

    `text[start:end]` is what the piece stands for, its leading space
    included; the spans are in order and do not overlap. Where several pieces
    stand for one character, the last of them has it and the others are empty.
    """
    spans, end = [], 0
    for piece in self._processor.Encode(text, out_type="proto").pieces:
      # Its own offsets count bytes or characters, by the library's version.
      start = text.find(piece.surface, end)
      end = start + len(piece.surface)
      spans.append((piece.piece, start, end))
    return spans

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to EOT, without the special ones."""
    kept = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
    sp = self._processor
    return sp.Decode(
      [i for i in kept if not (sp.IsControl(i) or sp.IsUnknown(i))]
    )


def get_tokenizer(
  config: ConfigDict, source: Source | None = None
) -> Tokenizer:
  """Returns the config's tokenizer, training it if need be.

  Args:
    config: `tokenizer.path` names a `.model`; if it is empty, one of at most
      `tokenizer.vocab_size` pieces is made from the training captions.
    source: the training split if it is open already; no other is used.

  Raises:
    UserError: if the model is missing or unfit, or the vocabulary too small.
  """
  if config.tokenizer.path:
    return _load_given(pathlib.Path(config.tokenizer.path).expanduser())
  if source is None or source.split != config.data.train_split:
    source = open_source(config.data, config.data.train_split)
  vocab_size = config.tokenizer.vocab_size
  name = _file_name(source.fingerprint, vocab_size)
  folders = [source.directory, pathlib.Path("~/.cache/vlp_jax").expanduser()]
  for folder in folders:
    try:
      return Tokenizer((folder / name).read_bytes())
    except (OSError, UserError):
      continue  # not there, or damaged
  model = train(source.captions(), vocab_size)
  for folder in folders:
    try:
      write_atomically(folder / name, model)
    except OSError:
      continue
    logging.info("trained a tokenizer, kept as %s", folder / name)
    break
  else:
    warn(f"the tokenizer could not be kept in {folders[0]} or {folders[1]}")
  return Tokenizer(model)


def train(captions: Iterable[str], vocab_size: int) -> bytes:
  """Trains a model; equal captions make equal bytes.

  Args:
    captions: at most a million of them are used, evenly spaced.
    vocab_size: an upper bound: few captions have fewer pieces.

  Raises:
    UserError: if the characters alone exceed the vocabulary, or there are none.
  """
  captions = _sample(" ".join(c.split())[:_MAX_CHARS] for c in captions)
  if not any(captions):
    raise UserError("no caption to train a tokenizer on has any text")
  attempts = [(1.0, False)] if vocab_size < _BYTES_FROM else []
  # More characters than pieces: the rare ones are spelt in bytes.
  attempts += [(share, True) for share in (0.9995, 0.99, 0.98)]
  for coverage, byte_fallback in attempts:
    model = io.BytesIO()
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=vocab_size,
        character_coverage=coverage,
        byte_fallback=byte_fallback,
        minloglevel=3,
        **_TRAINER,
      )
    except (RuntimeError, OSError) as e:
      error = e
    else:
      return model.getvalue()
  characters = len(set(itertools.chain.from_iterable(captions)))
  raise UserError(
    f"tokenizer.vocab_size={vocab_size} is too small for captions of "
    f"{characters} different characters; use {2 * characters + 300} or more"
  ) from error


def warn_cut(tokenizer: Tokenizer, source: Source, max_len: int) -> None:
  """Warns if some of the first captions are longer than `max_len` tokens."""
  first = itertools.islice(source.captions(), _CHECKED)
  lengths = [tokenizer.length(caption) for caption in first]
  cut = sum(length > max_len for length in lengths)
  if cut:
    warn(
      f"{cut} of the first {len(lengths)} captions are cut: they have up to "
      f"{max(lengths)} tokens, and config.tokenizer.max_len is {max_len}"
    )


def write_atomically(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that others may write, too: they see all of it or none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    temporary.write_bytes(data)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _load_given(path: pathlib.Path) -> Tokenizer:
  try:
    return Tokenizer(path.read_bytes())
  except OSError as e:
    raise UserError(f"tokenizer.path={path}: {e.strerror}") from e
  except UserError as e:
    raise UserError(f"tokenizer.path={path}: {e}") from e


def _file_name(fingerprint: str, vocab_size: int) -> str:
  recipe = json.dumps([fingerprint, _TRAINER, _BYTES_FROM], sort_keys=True)
  digest = hashlib.sha256(recipe.encode()).hexdigest()
  return f"tokenizer-{vocab_size}-{digest[:16]}.model"


def _sample(captions: Iterator[str]) -> list[str]:
  """Keeps every 2^k-th caption, with the least k that keeps few enough."""
  kept, step = [], 1
  for number, caption in enumerate(captions):
    if number % step == 0:
      kept.append(caption)
    if len(kept) > _MAX_CAPTIONS:
      kept, step = kept[::2], step * 2
  return kept
