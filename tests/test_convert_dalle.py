"""The mapping of DALL-E's encoder and its command, without PyTorch.

`tests/parity` reads pickles, and compares what the two encoders compute.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests import toys
from tests.e2e import commands
from vlp_jax.convert import dalle as convert
from vlp_jax.errors import UserError
from vlp_jax.models.dalle import DalleEncoder
from vlp_jax.models.visual_tokenizers import DalleCodes


def _theirs(width=8, vocab=11):
  """Tensors by their names; no two numbers are equal."""
  shapes = {"input": (width, 3, 7, 7)}
  fan_in = width
  for group in range(1, 5):
    out = width * 2 ** (group - 1)
    for block in (1, 2):
      name = f"group_{group}.block_{block}"
      if fan_in != out:
        shapes[f"{name}.id_path"] = (out, fan_in, 1, 1)
      shapes[f"{name}.res_path.conv_1"] = (out // 4, fan_in, 3, 3)
      shapes[f"{name}.res_path.conv_2"] = (out // 4, out // 4, 3, 3)
      shapes[f"{name}.res_path.conv_3"] = (out // 4, out // 4, 3, 3)
      shapes[f"{name}.res_path.conv_4"] = (out, out // 4, 1, 1)
      fan_in = out
  shapes["output.conv"] = (vocab, fan_in, 1, 1)
  tensors, count = {}, 0
  for name, shape in shapes.items():
    for kind, size in (("w", shape), ("b", shape[:1])):
      numbers = np.arange(count, count + np.prod(size), dtype=np.float32)
      tensors[f"blocks.{name}.{kind}"] = numbers.reshape(size)
      count += numbers.size
  return tensors


def test_every_tensor_has_its_place():
  tensors = _theirs()
  params = convert.from_dalle(tensors)
  encoder = DalleEncoder(width=8, vocab_size=11)
  pixels = jnp.zeros((1, 8, 8, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), pixels)["params"]
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
  out, fan_in, row, column = 5, 4, 2, 1
  theirs = tensors["blocks.group_3.block_2.res_path.conv_1.w"]
  ours = params["group_3_block_2"]["conv_1"]["kernel"]
  assert ours[row, column, fan_in, out] == theirs[out, fan_in, row, column]
  np.testing.assert_array_equal(
    params["group_2_block_1"]["id_path"]["bias"],
    tensors["blocks.group_2.block_1.id_path.b"],
  )
  np.testing.assert_array_equal(
    params["output"]["bias"], tensors["blocks.output.conv.b"]
  )
  values = np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
  assert len(np.unique(values)) == sum(x.size for x in tensors.values())


@pytest.mark.parametrize(
  "name, shape",
  [
    ("blocks.input.w", (8,)),
    ("blocks.input.bias", (8,)),
    ("blocks.group_1.block_1.res_path.conv_1.w.more", (8, 8, 3, 3)),
    ("blocks.group_1.upsample.w", (8, 8, 3, 3)),
  ],
)
def test_unknown_tensors_are_refused(name, shape):
  with pytest.raises(UserError, match=rf"no tensor {name} \(8,"):
    convert.from_dalle({name: np.zeros(shape)})


def test_no_tensors():
  with pytest.raises(UserError, match="no tensors"):
    convert.from_dalle({})


def test_the_command_writes_what_the_tokenizer_loads(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(convert, "read", lambda path: _theirs())
  path = tmp_path / "new" / "encoder.npz"
  convert.main(["encoder.pkl", str(path)])
  assert str(path) in capsys.readouterr().out
  assert [p.name for p in path.parent.iterdir()] == ["encoder.npz"]
  tokenizer = DalleCodes(str(path), 2, vocab_size=11, width=8)
  state = tokenizer.start(lambda: iter([]))
  toys.assert_trees_equal(state, convert.from_dalle(_theirs()))
  names = traverse_util.flatten_dict(state, sep="/")
  with np.load(path) as file:
    assert set(file) == set(names)


@pytest.mark.parametrize(
  "arguments, hint",
  [
    ((), "give two files"),
    (("encoder.pkl",), "give two files"),
    (("--input=encoder.pkl", "encoder.npz"), "give two files"),
    (("encoder.pkl", "encoder.bin"), "name it so"),
  ],
)
def test_arguments(arguments, hint):
  with pytest.raises(UserError, match=hint):
    convert.main(arguments)


def test_a_mistake_ends_in_one_line(tmp_path):
  command = ("convert.dalle", "absent.pkl", "encoder.npz")
  status, _, err = commands.run(*command, cwd=tmp_path)
  torch = importlib.util.find_spec("torch")
  hint = "No such file" if torch else "pip install torch"
  commands.assert_one_line(status, err, hint)
