"""What is done to the text of a caption before it is tokenized.

The rules are those of ALBEF, which SIMLA and others took over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from ml_collections import ConfigDict

# In this order: `<person>` stands for names that Conceptual Captions hides.
_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_BLANK = re.compile(r"[-/]")


@dataclasses.dataclass(frozen=True)
class CleanCaption:
  """Lower case, without punctuation, cut to so many words.

  `, . ' ! ? " ( ) * # : ; ~` are deleted, `-` and `/` become blanks, `<person>`
  becomes `person`, and runs of blanks become one.

  Attributes:
    max_words: words that are kept; 0 keeps all.
  """

  max_words: int = 0

  def __call__(self, text: str) -> str:
    """Returns the text cleaned; "" if nothing is left."""
    text = _BLANK.sub(" ", _DELETED.sub("", text.lower()))
    words = text.replace("<person>", "person").split()
    return " ".join(words[: self.max_words or None])


def cleaner(data: ConfigDict) -> Callable[[str], str]:
  """Returns what `data.clean_captions` does to each text; nothing, if off.

  Args:
    data: `clean_captions` and `max_words`.
  """
  return CleanCaption(data.max_words) if data.clean_captions else str
