"""Tokenizers of BERT, CLIP and RoBERTa, written from their papers' algorithms.

Plain Python, slow and independent of what is tested. Tiny vocabularies and a
table of texts are here, too.
"""

import itertools
import json
import unicodedata

TEXTS = [
  *("a red square", "Two green RINGS", "", " ", "a", "A man's hat.", "...!?"),
  *("café naïve Übermäßig forêt Ångström", "cafe\u0301", "ÉCOLE", "İstanbul"),
  *(
    "赤い四角と青い円",
    "한국어 문장",
    "日本 ж red",
    "красный круг",
    "ΟΔΟΣ ὁδός",
  ),
  *("a 🙂 red 👩‍👩‍👧 square", "🇩🇪", "it's he'll we'd they've I'm don't can't"),
  *("IT'S HE'LL", "12 3,456.78 2024-01-02 ½ ² 10%", "x" * 130, "red" * 40),
  *("two   blanks\tand\na line\r\nend ", "  leading", "trailing  "),
  *("a-b_c/d\\e", "#tag @name $5 <b>", "snake_case", "(brackets) [SEP] </s>"),
  *(
    "a\u00a0hard\u3000blank",
    "soft\u00adhyphen",
    "zero\u200bwidth",
    "\x07bell",
  ),
  *(
    "\ufffd",
    "red,square;blue:circle",
    "``quoted''",
    '"quotes"',
    "e\u0301\u0323",
  ),
]
# What CLIP tidies first.
UNTIDY = [
  *("“curly” ‘quotes’ it’s", "ﬁsh ﬂoor Ĳssel", "ＦＵＬＬ　ｗｉｄｔｈ ｶﾅ"),
  *(
    "&amp;amp; &lt;b&gt; &quot;red&quot; &#39;s",
    "AT&T &c",
    "&eacute;t&eacute;",
  ),
  *("\ufeffbom", "tab\x0bbed"),
]
CORPUS = (
  "a red square and a blue circle above the green ring two cats on the mat "
  "it's a man's hat they've we'd don't the café naïve 赤い 12 345 red-hot ... "
  "The Red Square . , ! ? red squares circles rings 🙂"
)


def is_punctuation(char: str) -> bool:
  """BERT's: all ASCII that is neither letter nor digit, and category P."""
  ascii_symbol = char.isascii() and char.isprintable() and not char.isalnum()
  return ascii_symbol or unicodedata.category(char).startswith("P")


def is_cjk(char: str) -> bool:
  ranges = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF)),
    *((0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF)),
    *((0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
  )
  return any(low <= ord(char) <= high for low, high in ranges)


def bert_words(text: str, lowercase: bool) -> list[str]:
  """Devlin et al. 2018, the reference code's basic tokenization."""
  spaced = []
  for char in text:
    if char in "\0\ufffd" or (
      unicodedata.category(char)[0] == "C" and char not in "\t\n\r"
    ):
      continue
    spaced.append(f" {char} " if is_cjk(char) else char)
  words = []
  for word in "".join(spaced).split():
    if lowercase:
      word = unicodedata.normalize("NFD", word.lower())
      word = "".join(c for c in word if unicodedata.category(c) != "Mn")
    for alone, chars in itertools.groupby(word, is_punctuation):
      run = "".join(chars)
      words += run if alone else [run]
  return words


def wordpiece(word: str, vocab: set[str]) -> list[str]:
  """Greedy longest match from the left; Wu et al. 2016."""
  pieces, start = [], 0
  if len(word) > 100:
    return ["[UNK]"]
  while start < len(word):
    for end in range(len(word), start, -1):
      piece = ("##" if start else "") + word[start:end]
      if piece in vocab:
        break
    else:
      return ["[UNK]"]
    pieces.append(piece)
    start = end
  return pieces


def byte_letters() -> list[str]:
  """A printable character for each byte, as in GPT-2."""
  plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = itertools.count(256)
  return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def bpe(letters: list[str], merges: list[str]) -> list[str]:
  """Joins the pair that was learnt first, until none is known."""
  ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
  word = list(letters)
  while True:
    pairs = [p for p in itertools.pairwise(word) if p in ranks]
    if not pairs:
      return word
    best, joined, i = min(pairs, key=ranks.__getitem__), [], 0
    while i < len(word):
      size = 2 if tuple(word[i : i + 2]) == best else 1
      joined.append("".join(word[i : i + size]))
      i += size
    word = joined


def _kind(char: str) -> str:
  category = unicodedata.category(char)[0]
  return (
    "space" if char.isspace() else category if category in "LN" else "other"
  )


def _contraction(text: str, i: int) -> int:
  for end in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
    if text.startswith(end, i):
      return len(end)
  return 0


def clip_words(text: str) -> list[str]:
  """Contractions, letters, single digits, other marks; blanks are dropped."""
  words, i = [], 0
  while i < len(text):
    kind, size = _kind(text[i]), _contraction(text, i) or 1
    if size == 1 and kind in ("L", "other"):
      while i + size < len(text) and _kind(text[i + size]) == kind:
        size += 1
    if kind != "space":
      words.append(text[i : i + size])
    i += size
  return words


def gpt2_words(text: str) -> list[str]:
  """Radford et al. 2019: as CLIP's, but words take the blank before them."""
  words, i = [], 0
  while i < len(text):
    size = _contraction(text, i)
    if not size:
      first = i + (text[i] == " " and i + 1 < len(text))
      kind = _kind(text[first])
      if kind == "space":
        first, kind = i, "space"
      size = first - i + 1
      while i + size < len(text) and _kind(text[i + size]) == kind:
        size += 1
      # The last of several blanks belongs to the word that follows.
      if kind == "space" and size > 1 and i + size < len(text):
        size -= 1
    words.append(text[i : i + size])
    i += size
  return words


def byte_bpe(word: str, merges: list[str], suffix: str = "") -> list[str]:
  letters = [byte_letters()[byte] for byte in word.encode()]
  return bpe([*letters[:-1], letters[-1] + suffix], merges)


def learn(words: list[str], suffix: str, count: int) -> list[str]:
  """Learns merges: always the most frequent pair, then the first in order."""
  letters = byte_letters()
  split = []
  for word in words:
    spelt = [letters[byte] for byte in word.encode()]
    split.append([*spelt[:-1], spelt[-1] + suffix])
  merges = []
  for _ in range(count):
    pairs = [p for word in split for p in itertools.pairwise(word)]
    if not pairs:
      break
    best = max(sorted(set(pairs)), key=pairs.count)
    merges.append(" ".join(best))
    split = [bpe(word, merges) for word in split]
  return merges


# --- Files ------------------------------------------------------------------


def write_bert(folder, lowercase=True):
  """Writes a `vocab.txt`; returns (path, pieces)."""
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  words = bert_words(CORPUS, lowercase)
  pieces += sorted({char for word in words for char in word} | {*"bdfkpqvxyz"})
  pieces += sorted({f"##{char}" for word in words for char in word})
  pieces += sorted({w for w in words if len(w) > 1} - {"squares", "rings"})
  path = folder / "vocab.txt"
  path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
  return path, pieces


def clip_vocabulary(merges):
  letters = sorted(byte_letters())
  vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
  vocab += [merge.replace(" ", "") for merge in merges]
  return [*vocab, "<|startoftext|>", "<|endoftext|>"]


def roberta_vocabulary(merges):
  vocab = ["<s>", "<pad>", "</s>", "<unk>", *byte_letters()]
  return [*vocab, *(merge.replace(" ", "") for merge in merges), "<mask>"]


def write_bpe(folder, kind):
  """Writes `vocab.json` and `merges.txt`; returns (path, pieces, merges)."""
  split, suffix, vocabulary = {
    "clip": (clip_words, "</w>", clip_vocabulary),
    "roberta": (gpt2_words, "", roberta_vocabulary),
  }[kind]
  merges = learn(split(CORPUS), suffix, 60)
  pieces = vocabulary(merges)
  path = folder / "vocab.json"
  ids = {piece: i for i, piece in enumerate(pieces)}
  path.write_text(json.dumps(ids), encoding="utf-8")
  lines = ["#version: 0.2", *merges]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  return path, pieces, merges
