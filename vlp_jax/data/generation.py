"""What data sets that are made, not read, have in common.

An example is a pure function of (data set, configuration, split, index). Run
as a module, this file writes examples to its standard output; `examples` reads
those of several such processes, which neither fork the caller nor import its
main module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pathlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any

_FEW = 400  # examples that are not worth the start of a process


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a configuration of a data set is, as far as all of them share it.

  Attributes:
    description: one line.
    num_train, num_eval: examples in `train` and in each of the other splits.
    image_size: pixels to a side.
  """

  description: str
  num_train: int
  num_eval: int
  image_size: int = 64

  def num_examples(self, split: str) -> int:
    """Returns the number of examples of a split."""
    return self.num_train if split == "train" else self.num_eval


def examples(module: str, name: str, split: str) -> Iterator[dict[str, Any]]:
  """Makes the examples of a split in order, several at a time.

  Args:
    module: of the data set, with `SPECS`, by name, and a function
      `example(spec, split, index)`.
    name: of the configuration.
    split: one that the module knows.

  Raises:
    RuntimeError: if a process that makes them fails.
  """
  generator = importlib.import_module(module)
  spec = generator.SPECS[name]
  total = spec.num_examples(split)
  if total <= _FEW:
    yield from (generator.example(spec, split, i) for i in range(total))
    return
  num_workers = min(os.cpu_count() or 1, 4)
  # The workers find this package where we did.
  root = str(pathlib.Path(__file__).parents[2])
  path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
  with contextlib.ExitStack() as stack:
    outputs = []
    for worker in range(num_workers):
      task = [module, name, split, str(worker), str(num_workers)]
      process = stack.enter_context(
        subprocess.Popen(
          [sys.executable, "-m", __name__, *task],
          stdout=subprocess.PIPE,
          stdin=subprocess.DEVNULL,
          env={**os.environ, "PYTHONPATH": path},
          pipesize=1 << 20,
          start_new_session=True,  # Ctrl-C is for us; we end them
        )
      )
      stack.callback(process.kill)
      outputs.append(process.stdout)
    for i in range(total):
      try:
        yield pickle.load(outputs[i % num_workers])
      except (EOFError, pickle.UnpicklingError) as e:
        raise RuntimeError(
          f"a process that draws {split} of {module}:{name} has stopped"
        ) from e


def distinct(
  total: int, content: Callable[[int, int], Hashable]
) -> tuple[int, ...]:
  """Counts the draws that are refused so that no two contents are equal.

  Args:
    total: number of draws to keep.
    content: of the index of a draw and the number of those refused before it;
      None is refused, too.

  Returns:
    The number of refused draws before each that is kept.
  """
  seen, attempts = {None}, []
  for index in range(total):
    attempt = 0
    while (found := content(index, attempt)) in seen:
      attempt += 1
    seen.add(found)
    attempts.append(attempt)
  return tuple(attempts)


def main(
  module: str, name: str, split: str, worker: str, num_workers: str
) -> None:
  """Writes every `num_workers`-th example of a split to standard output."""
  if hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader is gone: end
  generator = importlib.import_module(module)
  spec = generator.SPECS[name]
  for index in range(int(worker), spec.num_examples(split), int(num_workers)):
    pickle.dump(generator.example(spec, split, index), sys.stdout.buffer, 5)


if __name__ == "__main__":
  main(*sys.argv[1:])
