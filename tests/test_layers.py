"""Who may import whom (docs/architecture.md), and what must be documented."""

import ast
import importlib
import pathlib
import re
import sys

import pytest

from vlp_jax.methods import base as methods

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vlp_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

_INFRASTRUCTURE = {
  *("sharding", "optim", "checkpoint", "metrics", "config", "flags", "command"),
  *("factors", "fields", "hosts", "roll_call", "tpu_vm", "libtpu"),
  *("chips", "skips", "throughput", "profiling", "checksums", "quiet"),
  *("preemption", "garbage"),
}
_COMMAND_LINE = {"command", "flags"}
_LOOP = {"train_state", "train_step", "train"}
_BASE = "methods.base"
# What each layer may import from the package, beside itself and `errors`.
ALLOWED = {
  "errors": set(),
  "ops": set(),
  "models": {"ops"},
  "losses": {"ops"},
  "methods": {"models", "losses", "ops"},
  "data": {"ops", "factors"},
  "convert": {"ops", "config"},
  **{name: {"ops", *_INFRASTRUCTURE} for name in _INFRASTRUCTURE},
  "step_memory": set(),
  "presets": {"config"},
  "evaluators": {_BASE, "data", "metrics"},
  "train_state": {_BASE, "ops", "data", *_INFRASTRUCTURE},
  "train_step": {_BASE, "ops", "data", "train_state", *_INFRASTRUCTURE},
  "flops": {_BASE, "ops"},
  "hlo": {"hlo_text"},
  "hlo_text": set(),
  "chips": set(),
  "roofline": {
    _BASE,
    *("ops", "data", "chips", "flops", "hlo", "train_state", "train_step"),
    *_INFRASTRUCTURE,
  },
  "train": {
    _BASE,
    "ops",
    "data",
    "evaluators",
    "flops",
    *_LOOP,
    *_INFRASTRUCTURE,
  },
}
# Commands, and what they are made of, may import everything.
TOP = {*("main", "evaluate", "export", "aot", "runs", "pretrained", "__init__")}
# Commands of a layer below; they read flags and end with a status.
COMMANDS = {
  *("data/build.py", "data/prepare/__main__.py", "data/train_tokenizer.py"),
  "data/one_frame.py",
  *("convert/albef.py", "convert/dalle.py", "convert/npz.py"),
  "convert/scl.py",
}


# And from elsewhere, where that is little.
_MODELS = {"jax", "numpy", "flax"}
OUTSIDE = {
  "ops": {"jax", "numpy"},
  "losses": {"jax", "numpy"},
  "models": _MODELS,
  "methods": _MODELS,
}


def _layer(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(path: pathlib.Path):
  """Yields what a file imports from the package, without `vlp_jax.`."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      if name.split(".")[0] == "vlp_jax" and name != "vlp_jax":
        yield name.removeprefix("vlp_jax.")


def _permits(layer: str, name: str) -> bool:
  first = name.split(".")[0]
  if first in (layer, "errors", "__version__"):
    return True
  return any(
    name == allowed or name.startswith(f"{allowed}.")
    for allowed in ALLOWED[layer]
  )


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_imports_go_down(path):
  layer = _layer(path)
  if layer in TOP:
    return
  assert layer in ALLOWED, f"{layer} has no place in the table of layers"
  upwards = {name for name in _imports(path) if not _permits(layer, name)}
  if path.relative_to(PACKAGE).as_posix() in COMMANDS:
    upwards = {n for n in upwards if n.split(".")[0] not in _COMMAND_LINE}
  assert not upwards


@pytest.mark.parametrize("layer", OUTSIDE)
def test_the_inner_layers_need_little(layer):
  found = set()
  for path in (PACKAGE / layer).rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        found.add(node.module.split(".")[0])
  known = OUTSIDE[layer] | {"vlp_jax"} | sys.stdlib_module_names
  assert found <= known
  assert "jax" in found


def test_the_table_can_tell():
  assert not _permits("models", "losses.contrastive")
  assert not _permits("evaluators", "methods.coca")
  assert _permits("evaluators", "methods.base.Method")
  assert not _permits("data", "methods.base")


def test_the_loop_names_no_method():
  names = re.compile(r"\b(clip|coca|sycoca|albef|simla|scl)\b")
  for path in PACKAGE.glob("train*.py"):
    assert not names.search(path.read_text()), path


def test_only_checkpoint_knows_orbax():
  users = [p.name for p in FILES if "import orbax" in p.read_text()]
  users += [p.name for p in FILES if "from orbax" in p.read_text()]
  assert set(users) == {"checkpoint.py"}


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_what_is_public_is_documented(path):
  tree = ast.parse(path.read_text())
  if path.name != "__init__.py":
    assert ast.get_docstring(tree), path
  missing = []

  def visit(node, owner):
    for child in node.body:
      if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
        continue
      if child.name.startswith("_"):
        continue
      if not ast.get_docstring(child) and not _inherits(path, owner, child):
        missing.append(child.name)
      if isinstance(child, ast.ClassDef):
        visit(child, child)

  visit(tree, None)
  assert not missing


def _inherits(path, owner, child) -> bool:
  """Tells whether a base class, or the protocol of methods, documents it."""
  if owner is None:
    return False
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  classes = vars(importlib.import_module(name))[owner.name].__mro__[1:]
  if _layer(path) == "methods":
    classes += (methods.Method,)
  return any(
    vars(c)[child.name].__doc__ for c in classes if child.name in vars(c)
  )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_files_stay_small(path):
  assert len(path.read_text().splitlines()) <= 420
