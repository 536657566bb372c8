"""Texts to ids and back, for each kind of vocabulary; see `tokenizer.py`.

A model is kept as bytes that say themselves what they are:

- a SentencePiece model, as its library writes it;
- a Hugging Face `tokenizer.json`, as it was given;
- JSON with `type` (wordpiece, clip or roberta), `vocab` in the ids' order and
  `merges` or `lowercase`: what `vocabularies.py` makes of the other files.

Texts never hold special symbols: `</s>` or `[SEP]` in a caption is spelt out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vlp_jax.data import clip_text
from vlp_jax.errors import UserError

Span = tuple[str, int, int]

# Start, end, padding, unknown, mask. CLIP pads with id 0 and knows all bytes.
_SPECIALS = (
  ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"),
  ("<s>", "</s>", "<pad>", "<unk>", "<mask>"),
  ("<|startoftext|>", "<|endoftext|>", "", "", ""),
  ("<start_of_text>", "<end_of_text>", "", "", ""),
)
_BLANK = "▁"  # of SentencePiece and Metaspace
_BYTE_BLANKS = ("Ġ", "Ċ", "ĉ", "č")  # byte-level " ", "\n", "\t" and "\r"
_WORD_END = "</w>"
_CLIP_WORD = (
  r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # OpenAI's
)
_LONGEST_WORD = 100  # characters; BERT takes a longer one as unknown


class Codec:
  """What a tokenizer needs of a vocabulary.

  Attributes:
    vocab_size: number of ids.
    pad_id, unk_id, bos_id, eos_id, mask_id: special ids; -1 where there is
      none, except that padding is then 0.
    begins: bool `[V]`, pieces that begin a word.
    ends: bool `[V]`, pieces after which another word begins.
  """

  vocab_size: int
  pad_id: int
  unk_id: int
  bos_id: int
  eos_id: int
  mask_id: int
  begins: np.ndarray
  ends: np.ndarray

  def encode(self, text: str) -> list[int]:
    """Returns the ids of all of a text, without special ones."""
    raise NotImplementedError

  def spans(self, text: str) -> list[Span]:
    """Returns (piece, start, end) for each id; see `Tokenizer.pieces`."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, leaving special ones out."""
    raise NotImplementedError


def open_codec(model: bytes) -> Codec:
  """Reads a kept model.

  Raises:
    UserError: if it is damaged, of no known kind, or without a symbol for the
      start or for the end of a text.
  """
  if not model.startswith(b"{"):
    return SentencePieceCodec(model)
  try:
    spec = json.loads(model)
  except ValueError as e:
    raise UserError("not a tokenizer: its JSON is damaged") from e
  return LibraryCodec(spec)


class SentencePieceCodec(Codec):
  """A SentencePiece model."""

  def __init__(self, model: bytes):
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.vocab_size = self._processor.GetPieceSize()
    except (RuntimeError, OSError, ValueError) as e:
      raise UserError("not a SentencePiece model") from e
    if not self.vocab_size:
      raise UserError("not a SentencePiece model")
    self.pad_id = 0
    self.unk_id = self._processor.unk_id()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    if min(self.bos_id, self.eos_id) < 0:
      raise UserError(
        "the model has no BOS or no EOS piece, and captions need both; train "
        "it with --bos_id and --eos_id of at least 0"
      )
    pieces = [self._processor.IdToPiece(i) for i in range(self.vocab_size)]
    masks = [i for i, p in enumerate(pieces) if p in ("[MASK]", "<mask>")]
    self.mask_id = masks[0] if masks else -1
    self.begins = np.array([p.startswith(_BLANK) for p in pieces])
    self.ends = np.zeros_like(self.begins)

  def encode(self, text: str) -> list[int]:
    return self._processor.EncodeAsIds(text)

  def spans(self, text: str) -> list[Span]:
    spans, end = [], 0
    for piece in self._processor.Encode(text, out_type="proto").pieces:
      # Its own offsets count bytes or characters, by the library's version.
      start = text.find(piece.surface, end)
      end = start + len(piece.surface)
      spans.append((piece.piece, start, end))
    return spans

  def decode(self, ids: Sequence[int]) -> str:
    sp = self._processor
    return sp.Decode(
      [i for i in ids if not (sp.IsControl(i) or sp.IsUnknown(i))]
    )


class LibraryCodec(Codec):
  """A vocabulary that the `tokenizers` library reads."""

  def __init__(self, spec: dict[str, Any]):
    """Reads the JSON that this module's docstring describes."""
    kind = spec.get("type", "")
    self._clip = kind == "clip"
    self._lowers = self._clip or spec.get("lowercase", False)
    try:
      self._library = _BUILD.get(kind, _from_json)(spec)
    except UserError:
      raise
    except Exception as e:  # the library raises nothing more special
      raise UserError(f"not a tokenizer that can be read: {e}") from e
    vocab = self._library.get_vocab()
    self.vocab_size = max(vocab.values()) + 1
    known = [n for n in _SPECIALS if n[0] in vocab and n[1] in vocab]
    if not known:
      raise UserError(
        "its vocabulary has no symbols for the start and the end of a text: "
        + ", or ".join(f"{s[0]} and {s[1]}" for s in _SPECIALS)
      )
    bos, eos, pad, unk, mask = (vocab.get(name, -1) for name in known[0])
    self.bos_id, self.eos_id, self.pad_id = bos, eos, max(pad, 0)
    self.unk_id, self.mask_id = unk, mask
    self._special = {bos, eos, pad, unk, mask}
    pieces = [""] * self.vocab_size
    for piece, number in vocab.items():
      pieces[number] = piece
    self.begins, self.ends = _word_marks(self._library, pieces)

  def encode(self, text: str) -> list[int]:
    text = clip_text.clean(text) if self._clip else text
    return self._encode(text).ids

  def spans(self, text: str) -> list[Span]:
    cleaned, starts = text, list(range(len(text) + 1))
    if self._clip:
      cleaned, starts = clip_text.clean_with_origins(text)
    found = self._encode(cleaned)
    bounds = [(starts[start], starts[end]) for start, end in found.offsets]
    spans = []
    for i, (piece, (start, end)) in enumerate(
      zip(found.tokens, bounds, strict=True)
    ):
      if i + 1 < len(bounds):  # the last piece of a character has it
        end = max(start, min(end, bounds[i + 1][0]))
      spans.append((piece, spans[-1][2] if spans else start, end))
    return spans

  def decode(self, ids: Sequence[int]) -> str:
    kept = [i for i in ids if i not in self._special]
    text = self._library.decode(kept, skip_special_tokens=False)
    return text.rstrip(" ") if self._clip else text  # one after each word

  def _encode(self, text: str) -> tokenizers.Encoding:
    text = _lower_sigma(text) if self._lowers else text
    return self._library.encode(text, add_special_tokens=False)


def _lower_sigma(text: str) -> str:
  """Lower-cases a text with capital sigmas: at a word's end they become `ς`.

  The library, which lower-cases everything else, writes `σ` everywhere.
  """
  lowered = text.lower() if "Σ" in text else text
  return lowered if len(lowered) == len(text) else text


def _wordpiece(spec: dict[str, Any]) -> tokenizers.Tokenizer:
  vocab = {piece: i for i, piece in enumerate(spec["vocab"])}
  if "[UNK]" not in vocab:
    raise UserError("its vocabulary has no [UNK]")
  library = tokenizers.Tokenizer(
    models.WordPiece(
      vocab, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD
    )
  )
  library.normalizer = normalizers.BertNormalizer(lowercase=spec["lowercase"])
  library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  library.decoder = decoders.WordPiece()
  return library


def _clip(spec: dict[str, Any]) -> tokenizers.Tokenizer:
  library = _byte_bpe(spec, _WORD_END)
  library.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Lowercase()]
  )
  words = tokenizers.Regex(_CLIP_WORD)
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(words, "removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  library.decoder = decoders.Sequence(
    [decoders.ByteLevel(), decoders.Replace(_WORD_END, " ")]
  )
  return library


def _roberta(spec: dict[str, Any]) -> tokenizers.Tokenizer:
  library = _byte_bpe(spec, "")
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = decoders.ByteLevel()
  return library


def _byte_bpe(spec: dict[str, Any], suffix: str) -> tokenizers.Tokenizer:
  vocab = {piece: i for i, piece in enumerate(spec["vocab"])}
  letters = pre_tokenizers.ByteLevel.alphabet()
  letters += [letter + suffix for letter in letters] if suffix else []
  missing = [letter for letter in letters if letter not in vocab]
  if missing:
    raise UserError(
      f"its vocabulary lacks {len(missing)} of the {len(letters)} pieces that "
      "spell single bytes: it is not a byte-level one"
    )
  merges = [tuple(merge.split(" ")) for merge in spec["merges"]]
  ending = {"end_of_word_suffix": suffix} if suffix else {}
  return tokenizers.Tokenizer(models.BPE(vocab, merges, **ending))


def _from_json(spec: dict[str, Any]) -> tokenizers.Tokenizer:
  library = tokenizers.Tokenizer.from_str(json.dumps(spec))
  library.no_truncation()
  library.no_padding()
  library.encode_special_tokens = True  # in texts they are spelt out
  return library


_BUILD = {"wordpiece": _wordpiece, "clip": _clip, "roberta": _roberta}


def _word_marks(
  library: tokenizers.Tokenizer, pieces: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `Codec.begins` and `Codec.ends`.

  Raises:
    UserError: if the model is of a type that marks no words.
  """
  model = library.model
  nothing = np.zeros(len(pieces), bool)
  if isinstance(model, models.WordPiece):
    prefix = model.continuing_subword_prefix
    return np.array([not p.startswith(prefix) for p in pieces]), nothing
  if isinstance(model, models.BPE) and model.end_of_word_suffix:
    suffix = model.end_of_word_suffix
    return nothing, np.array([p.endswith(suffix) for p in pieces])
  if not isinstance(model, (models.BPE, models.Unigram)):
    raise UserError(
      f"its model is a {type(model).__name__}; WordPiece, BPE and Unigram "
      "are what can be used"
    )
  blanks = (_BLANK, *_BYTE_BLANKS)
  return np.array([p.startswith(blanks) for p in pieces]), nothing
