"""The splits of a data set that somebody else has made, or nobody yet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from vlp_jax.errors import UserError

# Where neither the source nor the user says anything.
SHARES = (("train", 0.9), ("validation", 0.05), ("test", 0.05))
_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


def canonical(name: str) -> str:
  """Returns the name that a split goes by: `val` is `validation`."""
  return _ALIASES.get(name, name)


def checked(name: str, where: str) -> str:
  """Returns the name that a split of a TFDS data set goes by.

  Args:
    name: as it is given, or "" for none.
    where: that is.

  Raises:
    UserError: if TFDS could not read a split of this name.
  """
  if name and not re.fullmatch(r"[\w-]+", name):
    raise UserError(
      f"{where}: split {name!r}: a split's name is made of letters, digits, _ "
      "and -"
    )
  return canonical(name)


def hash64(text: str) -> int:
  """Hashes an id or a path to 64 bits, the same everywhere."""
  data = text.encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def draw(hashed: int, shares: Sequence[tuple[str, float]] = SHARES) -> str:
  """Draws a split by an image's hash: other images change nothing.

  Args:
    hashed: `hash64` of the image's id, or of its path if it has none.
    shares: (name, share) pairs; the shares add up to 1.
  """
  place = hashed / 2**64
  for name, share in shares:
    place -= share
    if place < 0:
      return name
  return shares[-1][0]
