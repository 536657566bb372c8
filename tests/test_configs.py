"""Every config builds, at every size, without an array being made."""

import importlib.util
import math
import re

import jax
import pytest

from vlp_jax import config as config_lib
from vlp_jax import optim, train_state
from vlp_jax.methods import base

SIZES = {
  "clip": ("tiny", "debug", "b16"),
  "coca": ("tiny", "debug", "b16", "b18", "l18", "g18"),
  "sycoca": ("tiny", "debug", "b16", "b18"),
}
CASES = [(name, size) for name, sizes in SIZES.items() for size in sizes]


def _state(config):
  method = base.get(config.method.name, config)
  config_lib.validate(config, 1, method.match_group)
  optimizer, _ = optim.make_optimizer(config, 100, 10)
  return jax.eval_shape(
    lambda: train_state.create(
      method, optimizer, train_state.batch_spec(config), seed=0, use_ema=True
    )
  )


def _count(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "size"), CASES)
def test_builds(name, size):
  config = config_lib.load(f"configs/{name}.py:{size}")
  state = _state(config)
  assert _count(state.params) == _count(state.ema_params) > 0
  assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", SIZES)
def test_tiny_is_the_default_and_opens_with_its_command(name):
  path = config_lib.find(f"configs/{name}.py")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  commands = re.findall(
    r"--config=configs/(\w+)\.py(?::(\w+))?", module.__doc__
  )
  assert [c for c, _ in commands] == [name] * len(commands)
  assert [size or "tiny" for _, size in commands] == list(SIZES[name])
  assert module.get_config() == module.get_config("tiny")


@pytest.mark.parametrize(
  ("size", "millions"),
  [("b18", 296.5 + 86), ("l18", 483.4 + 303), ("g18", 1_179 + 1_010)],
)
def test_coca_has_the_papers_parameters(size, millions):
  # Text and image parts of Yu et al. 2022, table 1, without the poolers. Its
  # 2.1B is truncated: layer by layer, the text part alone has 1,179 M.
  config = config_lib.load(f"configs/coca.py:{size}")
  params = _state(config).params
  count = _count(params) - _count(params["image_pool"])
  assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_sycoca_adds_an_image_decoder_to_coca():
  sycoca, coca = (
    _state(config_lib.load(f"configs/{name}.py:b16")).params
    for name in ("sycoca", "coca")
  )
  assert set(sycoca) - set(coca) == {"image_decoder", "decoder_input", "pixels"}
  for name in coca:
    assert jax.tree.map(lambda x: x.shape, sycoca[name]) == jax.tree.map(
      lambda x: x.shape, coca[name]
    )
