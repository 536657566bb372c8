"""How CLIP's tokenizer tidies a text before it lower-cases and splits it.

OpenAI's own runs `ftfy.fix_text` and unescapes HTML twice. Here is what of
ftfy concerns intact text: curly quotes made straight, ligatures taken apart,
full-width forms made plain, control characters dropped. Not here is the repair
of mojibake, text that was decoded wrongly and is better mended at its source.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable

_Step = tuple[re.Pattern, Callable[[str], str]]

_DIGRAPHS = {
  **{"Ĳ": "IJ", "ĳ": "ij", "ŉ": "'n", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz"},
  **{"Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj"},
  **{"Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl"},
  **{"ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"},
}
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);?")
_STEPS: tuple[_Step, ...] = (
  (_ENTITY, html.unescape),
  (_ENTITY, html.unescape),
  (re.compile("[ʼ‘-‛]"), lambda _: "'"),
  (re.compile("[“-‟]"), lambda _: '"'),
  (re.compile(f"[{''.join(_DIGRAPHS)}]"), _DIGRAPHS.__getitem__),
  (
    re.compile("[\u3000\uff01-\uffef]"),
    lambda character: unicodedata.normalize("NFKC", character),
  ),
  (
    re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"),
    lambda _: "",
  ),
)


def clean(text: str) -> str:
  """Returns a tidied text; blanks and case are left as they are."""
  for pattern, replace in _STEPS:
    text = pattern.sub(lambda found, r=replace: r(found.group()), text)
  return text


def clean_with_origins(text: str) -> tuple[str, list[int]]:
  """Returns `clean(text)` and where in `text` it comes from.

  The second has one number more than the first has characters: character i
  of the first comes from `text[origins[i] : origins[i + 1]]`, and of several
  that share an origin the last has all of it.
  """
  origins = list(range(len(text) + 1))
  for pattern, replace in _STEPS:
    parts, kept, end = [], [], 0
    for found in pattern.finditer(text):
      new = replace(found.group())
      parts += [text[end : found.start()], new]
      kept += origins[end : found.start()]
      kept += [origins[found.start()]] * len(new)
      end = found.end()
    text, origins = "".join([*parts, text[end:]]), [*kept, *origins[end:]]
  return text, origins
