"""Fields of a config that give names their numbers, as JSON."""

from __future__ import annotations

import json
import math

from vlp_jax.errors import UserError


def parse(field: str, text: str, example: str) -> dict[str, float]:
  """Reads names and their positive numbers, a JSON object.

  Args:
    field: the config's field, for messages.
    text: what it holds.
    example: of what it may hold.

  Raises:
    UserError: saying what is wrong.
  """
  try:
    factors = json.loads(text)
  except ValueError as e:
    raise UserError(
      f"{field}={text} is not JSON ({e}); it is like {example}"
    ) from e
  if not isinstance(factors, dict) or not factors:
    raise UserError(
      f"{field}={text} is not a JSON object; it is like {example}"
    )
  for name, factor in factors.items():
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not number or not 0 < factor < math.inf:
      raise UserError(
        f"{field}: the number of {name!r} is {factor!r}, but must be positive"
      )
  return factors
