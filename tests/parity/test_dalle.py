"""DALL-E's encoder in PyTorch, pickled as released, read and compared.

The modules are written here, after the structure that the released pickle has,
and stand under the names that it uses; OpenAI's package is not needed.
"""

import collections
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.e2e import commands
from vlp_jax.convert import dalle as convert
from vlp_jax.errors import UserError
from vlp_jax.models.dalle import DalleEncoder
from vlp_jax.models.visual_tokenizers import DalleCodes

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = pytest.mark.parity

WIDTH, VOCAB = 16, 37


def _chain(**parts):
  return nn.Sequential(collections.OrderedDict(parts))


class Conv2d(nn.Module):
  """A convolution whose parameters are called `w` and `b`."""

  def __init__(self, fan_in, out, size):
    super().__init__()
    std = (2 / (fan_in * size**2)) ** 0.5
    self.w = nn.Parameter(torch.randn(out, fan_in, size, size) * std)
    self.b = nn.Parameter(torch.randn(out) * 0.1)
    self.use_float16 = True
    self.device = torch.device("cpu")

  def forward(self, x):
    return nn.functional.conv2d(x, self.w, self.b, padding="same")


class EncoderBlock(nn.Module):
  """A residual block."""

  def __init__(self, fan_in, out):
    super().__init__()
    hidden = out // 4
    self.id_path = Conv2d(fan_in, out, 1) if fan_in != out else nn.Identity()
    self.res_path = _chain(
      relu_1=nn.ReLU(),
      conv_1=Conv2d(fan_in, hidden, 3),
      relu_2=nn.ReLU(),
      conv_2=Conv2d(hidden, hidden, 3),
      relu_3=nn.ReLU(),
      conv_3=Conv2d(hidden, hidden, 3),
      relu_4=nn.ReLU(),
      conv_4=Conv2d(hidden, out, 1),
    )

  def forward(self, x):
    return self.id_path(x) + self.res_path(x) / 64


class Encoder(nn.Module):
  """Four groups of two blocks."""

  def __init__(self):
    super().__init__()
    parts, fan_in = {"input": Conv2d(3, WIDTH, 7)}, WIDTH
    for group in range(1, 5):
      out = WIDTH * 2 ** (group - 1)
      blocks = dict(
        block_1=EncoderBlock(fan_in, out), block_2=EncoderBlock(out, out)
      )
      if group < 4:
        blocks["pool"] = nn.MaxPool2d(kernel_size=2)
      parts[f"group_{group}"] = _chain(**blocks)
      fan_in = out
    parts["output"] = _chain(relu=nn.ReLU(), conv=Conv2d(fan_in, VOCAB, 1))
    self.blocks = _chain(**parts)

  def forward(self, x):
    return self.blocks(x)


@pytest.fixture
def released(monkeypatch):
  """Gives the classes their released names, while something is pickled."""
  package = types.ModuleType("dall_e")
  for name, classes in {
    "encoder": (Encoder, EncoderBlock),
    "utils": (Conv2d,),
  }.items():
    module = types.ModuleType(f"dall_e.{name}")
    module.__file__ = __file__  # the old format keeps the source, too
    for kind in classes:
      monkeypatch.setattr(kind, "__module__", module.__name__)
      setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(package, name, module)
  monkeypatch.setitem(sys.modules, "dall_e", package)

  def save(module, path, new_format=True):
    torch.save(module, path, _use_new_zipfile_serialization=new_format)
    for name in ("dall_e", "dall_e.encoder", "dall_e.utils"):
      monkeypatch.delitem(sys.modules, name)
    return path

  return save


def _convert(path):
  target = path.with_name("encoder.npz")
  convert.main([str(path), str(target)])
  return DalleCodes(str(target), 4, vocab_size=VOCAB, width=WIDTH)


@pytest.mark.filterwarnings("error")
def test_logits(released, tmp_path):
  torch.manual_seed(0)
  peer = Encoder().eval()
  tokenizer = _convert(released(peer, tmp_path / "encoder.pkl"))
  state = tokenizer.start(lambda: iter([]))

  image = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  pixels = torch.from_numpy(image).permute(0, 3, 1, 2) / 255
  with torch.no_grad():
    expected = peer(0.8 * pixels + 0.1)
  codes = toys.jit(tokenizer.codes)(state, image)
  best = expected.argmax(1).reshape(3, 16)  # row by row
  np.testing.assert_array_equal(codes, best)

  encoder = DalleEncoder(width=WIDTH, vocab_size=VOCAB)
  logits = toys.jit(encoder.apply)(
    {"params": state}, jnp.asarray(image) / jnp.float32(255)
  )
  expected = expected.permute(0, 2, 3, 1).numpy()
  assert expected.std() > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_old_format(released, tmp_path):
  """Of a module it is refused, with a way out."""
  peer = Encoder()
  path = released(peer, tmp_path / "encoder.pkl", new_format=False)
  with pytest.raises(UserError, match=r"before 1\.6.*state_dict") as error:
    convert.read(path)
  assert "\n" not in str(error.value)
  torch.save(peer.state_dict(), path, _use_new_zipfile_serialization=False)
  state = _convert(path).start(lambda: iter([]))
  bias = peer.state_dict()["blocks.output.conv.b"]
  np.testing.assert_array_equal(state["output"]["bias"], bias)


class Attack:
  """Runs a command when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_what_a_pickle_would_run_is_not_run(released, tmp_path):
  peer = Encoder()
  peer.blocks.attack = Attack(tmp_path / "attacked")
  path = released(peer, tmp_path / "encoder.pkl")
  name = rf"{os.mkdir.__module__}\.mkdir.*nothing of the file"
  with pytest.raises(UserError, match=name):
    convert.read(path)
  assert not (tmp_path / "attacked").exists()


def test_another_class_is_refused(released, tmp_path):
  peer = Encoder()
  peer.blocks.add_module("extra", nn.Linear(2, 2))
  path = released(peer, tmp_path / "encoder.pkl")
  with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
    convert.read(path)


def test_a_mistake_ends_in_one_line(tmp_path):
  torch.save([torch.zeros(2)], tmp_path / "list.pkl")
  (tmp_path / "text.pkl").write_text("<html>not found</html>")
  (tmp_path / "empty.pkl").write_bytes(b"")
  for name, hint in {
    "list.pkl": "no PyTorch module",
    "text.pkl": "text.pkl",
    "empty.pkl": "empty.pkl",
  }.items():
    with pytest.raises(UserError, match=hint) as error:
      convert.read(tmp_path / name)
    assert "\n" not in str(error.value)
  command = ("convert.dalle", "text.pkl", "encoder.npz")
  status, _, err = commands.run(*command, cwd=tmp_path)
  commands.assert_one_line(status, err, "text.pkl")
  assert not (tmp_path / "encoder.npz").exists()
