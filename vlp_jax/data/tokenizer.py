"""The tokenizer: given, or trained on the captions at first use.

Texts become `[SOT] pieces [EOT] pad pad ...`. Which ids these are, the model
says; `text_len` says how many of them count.

A given one is of any kind that `vocabularies.py` reads. A trained one is
SentencePiece's:

  python -m vlp_jax.data.tokenizer --name=NAME --vocab_size=32000

makes it ahead, as training does at first use. It (byte-pair encoding,
lower-cased NFKC) is kept beside the data, under a name with the vocabulary's
size and a hash of the data and of how it was trained, so that changed captions
make another. Training is deterministic.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from absl import logging
from ml_collections import ConfigDict

from vlp_jax.data import captions as captions_lib
from vlp_jax.data import mixture, token_codecs, vocabularies
from vlp_jax.data.sources import Source
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
  """Encodes texts with a vocabulary of any kind; picklable.

  Attributes:
    vocab_size: number of pieces, the special ones included.
    sha256: of the model.
    pad_id, unk_id, bos_id, eos_id, mask_id: special ids; bos is SOT and eos
      is EOT. -1 stands for none, except that padding is then 0.
  """

  def __init__(self, model: bytes):
    """Makes a tokenizer of a model.

    Args:
      model: a SentencePiece model, or what else `token_codecs.py` describes.

    Raises:
      UserError: if it is no model, or knows no BOS or EOS.
    """
    self._codec = token_codecs.open_codec(model)
    self._model = model
    self.sha256 = hashlib.sha256(model).hexdigest()
    self.vocab_size = self._codec.vocab_size
    self.pad_id = self._codec.pad_id
    self.unk_id = self._codec.unk_id
    self.bos_id = self._codec.bos_id
    self.eos_id = self._codec.eos_id
    self.mask_id = self._codec.mask_id

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
    ids = self._codec.encode(text)
    ids = [self.bos_id, *ids[: max_len - 2], self.eos_id]
    padded = np.full(max_len, self.pad_id, np.int32)
    padded[: len(ids)] = ids
    return padded, len(ids)

  def length(self, text: str) -> int:
    """Returns the number of ids of a text that is not cut."""
    return len(self._codec.encode(text)) + 2

  def encode_batch(
    self, texts: Sequence[str], max_len: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids int32 `[N, max_len]`, lengths int32 `[N]`)."""
    ids = np.full((len(texts), max_len), self.pad_id, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      ids[row], lengths[row] = self.encode(text, max_len)
    return ids, lengths

  def word_ids(self, text: str, max_len: int) -> np.ndarray:
    """Returns the number of the word that each id of `encode` belongs to.

    What is a word, the vocabulary says. With SentencePiece and RoBERTa it
    reaches from blank to blank; with BERT and CLIP punctuation marks are words
    of their own, and with CLIP so are digits and the `'s` of `it's`.

    Returns:
      int32 `[max_len]`, rising from 0; -1 for special ids and padding.
    """
    ids, length = self.encode(text, max_len)
    ids, words = ids[1 : length - 1], np.full(max_len, -1, np.int32)
    begins = self._codec.begins[ids]
    begins[1:] |= self._codec.ends[ids[:-1]]
    begins[:1] = True
    words[1 : length - 1] = np.cumsum(begins) - 1
    return words

  def pieces(self, text: str) -> list[tuple[str, int, int]]:
    """Returns (piece, start, end) for the ids between SOT and EOT.

    `text[start:end]` is what the piece stands for, its leading space
    included; the spans are in order and do not overlap. Where several pieces
    stand for one character, the last of them has it and the others are empty.
    """
    return self._codec.spans(text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to EOT, without the special ones."""
    kept = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
    return self._codec.decode(list(kept))


def get_tokenizer(
  config: ConfigDict, source: Source | None = None
) -> Tokenizer:
  """Returns the config's tokenizer, training it if need be.

  Args:
    config: `tokenizer.path` names a file that `vocabularies.py` reads; if it
      is empty, a model of at most `tokenizer.vocab_size` pieces is made from
      the training captions.
    source: the training split if it is open already; no other is used.

  Raises:
    UserError: if the file is missing or unfit, or the vocabulary too small.
  """
  vocab_size = config.tokenizer.vocab_size
  if config.tokenizer.path:
    path = pathlib.Path(config.tokenizer.path).expanduser()
    tokenizer = _load_given(path)
    if tokenizer.vocab_size > vocab_size:
      raise UserError(
        f"tokenizer.path={path} has {tokenizer.vocab_size} pieces; set "
        f"--config.tokenizer.vocab_size={tokenizer.vocab_size}, or more "
        f"(now {vocab_size})"
      )
    return tokenizer
  if source is None or source.split != config.data.train_split:
    source = mixture.open_training(config.data)
  clean = captions_lib.cleaner(config.data)
  return trained_once(source, vocab_size, clean)[0]


def trained_once(
  source: Source, vocab_size: int, clean: Callable[[str], str] = str
) -> tuple[Tokenizer, pathlib.Path | None]:
  """Returns a source's trained tokenizer, and where it is kept.

  Args:
    source: the training split.
    vocab_size: the most pieces that it may have.
    clean: what is done to captions first.

  Raises:
    UserError: if the vocabulary is too small.
  """
  name = _file_name(source.fingerprint, vocab_size, clean)
  folders = [source.directory, pathlib.Path("~/.cache/vlp_jax").expanduser()]
  for folder in folders:
    try:
      return Tokenizer((folder / name).read_bytes()), folder / name
    except (OSError, UserError):
      continue  # not there, or damaged
  model = train(map(clean, source.captions()), vocab_size)
  for folder in folders:
    try:
      write_atomically(folder / name, model)
    except OSError:
      continue
    logging.info("trained a tokenizer, kept as %s", folder / name)
    return Tokenizer(model), folder / name
  warn(f"the tokenizer could not be kept in {folders[0]} or {folders[1]}")
  return Tokenizer(model), None


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


def warn_cut(tokenizer: Tokenizer, source: Source, config: ConfigDict) -> None:
  """Warns if some of the first captions exceed `config.tokenizer.max_len`."""
  max_len = config.tokenizer.max_len
  clean = captions_lib.cleaner(config.data)
  first = itertools.islice(source.captions(), _CHECKED)
  lengths = [tokenizer.length(clean(caption)) for caption in first]
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
    return Tokenizer(vocabularies.read(path))
  except OSError as e:
    raise UserError(f"tokenizer.path={path}: {e.strerror}") from e
  except UserError as e:
    raise UserError(f"tokenizer.path={path}: {e}") from e


def _file_name(
  fingerprint: str, vocab_size: int, clean: Callable[[str], str]
) -> str:
  recipe = [fingerprint, _TRAINER, _BYTES_FROM]
  recipe = json.dumps(
    recipe if clean is str else [*recipe, repr(clean)], sort_keys=True
  )
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


if __name__ == "__main__":
  from vlp_jax.data import train_tokenizer

  train_tokenizer.run()
