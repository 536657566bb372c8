"""DeiT and BERT files to the parameters that a run starts from."""

import dataclasses

import numpy as np
import pytest

from tests import toys
from tests.methods import test_simla_golden as golden
from vlp_jax.convert import albef as convert
from vlp_jax.errors import UserError

FLAGS = [
  "--config=configs/simla.py:reference",
  *(f"--config.{item}" for item in golden.SIZES),
]


@pytest.fixture
def files(tmp_path):
  """A DeiT of another resolution, and a BERT as it was first published."""
  deit, bert = {}, {}
  for name, shape in golden.shapes().items():
    top, _, rest = name.partition(".")
    value = golden.fill(name, shape)
    if top == "visual_encoder" and rest != "mask_token":
      deit[rest] = value
    if top == "text_encoder" and "crossattention" not in rest:
      rest = rest.replace("LayerNorm.weight", "LayerNorm.gamma")
      bert[rest.replace("LayerNorm.bias", "LayerNorm.beta")] = value
  deit["pos_embed"] = golden.fill("pos", (1, 1 + 9, 48))
  deit["head.weight"] = np.zeros((5, 48), np.float32)
  np.savez(tmp_path / "deit.npz", **deit)
  np.savez(tmp_path / "bert.npz", **bert)
  return tmp_path


def test_towers(files, capsys):
  output = files / "out" / "start.npz"
  convert.main(
    [
      *FLAGS,
      f"--deit={files / 'deit.npz'}",
      f"--bert={files / 'bert.npz'}",
      f"--output={output}",
    ]
  )
  assert f"parameters, in {output}" in capsys.readouterr().out
  method = dataclasses.replace(
    golden.method(), start_file=str(output), visual_tokenizer=None
  )
  before = toys.random_like(golden.params())
  after, _ = method.start(before, {}, None)
  expected = golden.params()
  toys.assert_trees_equal(after["words"], expected["words"])
  toys.assert_trees_equal(after["vision_norm"], expected["vision_norm"])
  layers = after["stream"]["transformer"]["layers"]
  for name, value in expected["stream"]["transformer"]["layers"].items():
    source = before["stream"]["transformer"]["layers"]
    new = source[name] if name.startswith("cross") else value
    toys.assert_trees_equal(layers[name], new)
  for name in ("patch", "cls", "transformer"):
    toys.assert_trees_equal(after["vision"][name], expected["vision"][name])
  assert after["vision"]["pos"].shape == (16, 48)  # resized from 3 x 3
  np.testing.assert_array_equal(
    after["vision"]["mask_token"], before["vision"]["mask_token"]
  )


def test_a_released_model(tmp_path):
  state = {k: golden.fill(k, v) for k, v in golden.shapes().items()}
  np.savez(tmp_path / "released.npz", **state)
  output = tmp_path / "start.npz"
  convert.main(
    [*FLAGS, f"--released={tmp_path / 'released.npz'}", f"--output={output}"]
  )
  method = dataclasses.replace(
    golden.method(), start_file=str(output), visual_tokenizer=None
  )
  after, _ = method.start(toys.random_like(golden.params()), {}, None)
  expected = golden.params()
  expected["temperature"] = {"value": state["temp"]}
  toys.assert_trees_equal(after, expected)


def test_mistakes(files):
  deit, output = f"--deit={files / 'deit.npz'}", f"--output={files / 'x.npz'}"
  np.savez(files / "part.npz", cls_token=np.zeros((1, 1, 48), np.float32))
  (files / "broken.npz").write_bytes(b"no zip")
  for flags, says in (
    ([deit], "--output=FILE.npz"),
    ([output], "--deit=FILE, --bert=FILE"),
    ([deit, f"--output={files / 'x.bin'}"], "name it so"),
    ([f"--deit={files / 'none.npz'}", output], "no such file"),
    ([f"--deit={files / 'broken.npz'}", output], "cannot be read"),
    ([f"--deit={files / 'part.npz'}", output], "has no tensor"),
  ):
    with pytest.raises(UserError, match=says):
      convert.main([*FLAGS, *flags])
