"""Reads `--flag=value` arguments, and values of a known type.

absl's flags abort with a usage text of their own; here every mistake is a
`UserError` of one line, which a command turns into exit status 2.
"""

from __future__ import annotations

import ast
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vlp_jax.errors import UserError


def parse_flags(
  argv: Sequence[str], flags: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Splits arguments into typed flags and config overrides.

  `--name=value` and `--name value` are the same; `--name` alone sets a bool.

  Args:
    argv: the arguments, without the program's name.
    flags: names and defaults; a default's type is the flag's.

  Returns:
    All flags with their values, and the strings `a.b.c=value` of the
    `--config.a.b.c=value` arguments.

  Raises:
    UserError: on an unknown flag (naming the nearest) or a bad value.
  """
  values, overrides = dict(flags), []
  queue = list(argv)
  while queue:
    argument = queue.pop(0)
    if not argument.startswith("--"):
      raise UserError(f"{argument!r} is not of the form --flag=value")
    name, equals, text = argument[2:].partition("=")
    is_field = name.startswith("config.")
    if not is_field and name not in flags:
      known = [f"--{flag}" for flag in flags]
      raise UserError(f"no flag --{name}{did_you_mean(f'--{name}', known)}")
    if not equals:
      if not is_field and isinstance(flags[name], bool):
        text = "true"
      elif queue and not queue[0].startswith("--"):
        text = queue.pop(0)
      else:
        raise UserError(f"--{name} lacks a value: --{name}=VALUE")
    if is_field:
      overrides.append(f"{name.removeprefix('config.')}={text}")
    else:
      values[name] = parse_value(f"--{name}", text, flags[name])
  return values, overrides


def print_help(argv: Sequence[str], usage: str) -> None:
  """Where `-h` or `--help` is among the arguments: prints, exits with 0."""
  if {"-h", "--help"} & set(argv):
    print(usage.strip())
    sys.exit(0)


def parse_only_flags(
  argv: Sequence[str], flags: Mapping[str, Any], usage: str
) -> dict[str, Any]:
  """Reads the arguments of a command that has flags and no config.

  Args:
    argv: the arguments, without the program's name.
    flags: names and defaults; a default's type is the flag's.
    usage: what `--help` prints.

  Returns:
    All flags with their values.

  Raises:
    UserError: on an unknown flag, a bad value, or a field of a config.
    SystemExit: with status 0, after `--help`.
  """
  print_help(argv, usage)
  values, overrides = parse_flags(argv, flags)
  if overrides:
    raise UserError("this command takes no --config; see --help")
  return values


def parse_value(name: str, text: str, like: Any) -> Any:
  """Reads `text` as a value of the type of `like`.

  An int is welcome for a float field; a float is refused for an int field.

  Raises:
    UserError: saying which type `name` is of.
  """
  try:
    return _parse(text, like)
  except (KeyError, SyntaxError, TypeError, ValueError):
    kind = type(like).__name__
    if isinstance(like, tuple) and like:
      kind = f"tuple of {type(like[0]).__name__}"
    raise UserError(
      f"{name} is of type {kind} (now {like!r}); {text!r} is not"
    ) from None


def _parse(text: str, like: Any) -> Any:
  if isinstance(like, bool):  # before int, which a bool is
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
  if isinstance(like, int):
    return int(text)
  if isinstance(like, float):
    value = float(text)
    if not math.isfinite(value):
      raise ValueError(text)
    return value
  if isinstance(like, tuple):
    values = ast.literal_eval(text) if text else ()
    values = values if isinstance(values, (tuple, list)) else (values,)
    return tuple(_parse(str(v), like[0]) if like else v for v in values)
  if like is None:
    return ast.literal_eval(text)
  return text


def did_you_mean(name: str, known: Sequence[str]) -> str:
  """Returns `; did you mean X?` with the nearest X, for an error's end."""
  near = difflib.get_close_matches(name, known, 1, cutoff=0.0)
  return f"; did you mean {near[0]}?" if near else ""
