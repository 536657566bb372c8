"""SCL's release in PyTorch's and transformers' modules, converted and compared.

The modules are put together here, under the names of the release: its vision
transformer of PyTorch's attention, RoBERTa of transformers, and co-attention
of transformers' BERT layers with cross-attention.
"""

import sys
import types

import numpy as np
import pytest

from benchmarks import open_clip_peer
from tests import toys
from tests.models import two_streams
from tests.test_convert_scl import FRAMES, LENGTHS, L, _call
from vlp_jax.convert import scl as convert
from vlp_jax.convert import state_dict
from vlp_jax.errors import UserError
from vlp_jax.ops import patches as patches_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
try:
  open_clip_peer.load()  # so that transformers finds a torchvision that works
except ImportError as error:
  pytest.skip(str(error), allow_module_level=True)
from transformers.models.bert.modeling_bert import BertLayer  # noqa: E402

nn = torch.nn

pytestmark = pytest.mark.parity


class QuickGELU(nn.Module):
  """As OpenAI's CLIP has it."""

  def forward(self, x):
    return x * torch.sigmoid(1.702 * x)


class ResBlock(nn.Module):
  """A pre-norm block of CLIP."""

  def __init__(self, width, heads):
    super().__init__()
    self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
    self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.mlp = nn.Sequential()
    self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
    self.mlp.add_module("gelu", QuickGELU())
    self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

  def forward(self, x, hidden):
    y = self.ln_1(x)
    x = x + self.attn(y, y, y, attn_mask=hidden, need_weights=False)[0]
    return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
  """Frames as one sequence, and a mask of the pairs that do not attend."""

  def __init__(self, width, heads, depth, patch, count, frames):
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
    self.class_embedding = nn.Parameter(torch.zeros(width))
    self.positional_embedding = nn.Parameter(torch.zeros(1 + count, width))
    self.temporal_embed = nn.Parameter(torch.zeros(1, frames, width))
    self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
    self.transformer = nn.Module()
    self.transformer.resblocks = nn.ModuleList(
      ResBlock(width, heads) for _ in range(depth)
    )

  def forward(self, video):  # [B, F, 3, H, W]
    b, f = video.shape[:2]
    x = self.conv1(video.flatten(0, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_embedding.expand(b * f, 1, -1), x], 1)
    x = (x + self.positional_embedding).unflatten(0, (b, f))
    x = x + self.temporal_embed[:, :f, None]
    size = x.shape[2]
    x = self.ln_pre(x.flatten(1, 2))
    at = torch.arange(f * size)
    same = at[:, None] // size == at // size
    hidden = ~(same | (at % size == 0)[:, None])
    for block in self.transformer.resblocks:
      x = block(x, hidden)
    x = self.ln_post(x).unflatten(1, (f, size))
    return torch.cat([x[:, :, 0], x[:, :, 1:].flatten(1, 2)], 1)


class Released(nn.Module):
  """A release, as far as SCL uses it."""

  def __init__(self, config):
    super().__init__()
    model, words = config.model, config.tokenizer.vocab_size
    v, t, d = (model[k].width for k in ("vision", "text", "fusion"))
    vision = model.vision
    self.vision_transformer = nn.Module()
    self.vision_transformer.visual = Visual(
      v,
      vision.num_heads,
      vision.depth,
      vision.patch_size,
      (config.data.image_size // vision.patch_size) ** 2,
      vision.frames,
    )

    def roberta(tower, **fields):
      return transformers.RobertaConfig(
        hidden_size=tower.width,
        num_attention_heads=tower.num_heads,
        num_hidden_layers=tower.depth,
        intermediate_size=4 * tower.width,
        attn_implementation="eager",
        **fields,
      )

    self.text_transformer = transformers.RobertaModel(
      roberta(
        model.text,
        vocab_size=words,
        max_position_embeddings=2 + model.text.max_len,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
      )
    )
    layer = roberta(model.fusion, is_decoder=True, add_cross_attention=True)
    layer.layer_norm_eps = 1e-12
    depth = range(model.fusion.depth)
    self.cross_modal_text_layers, self.cross_modal_image_layers = (
      nn.ModuleList(BertLayer(layer) for _ in depth) for _ in range(2)
    )
    self.cross_modal_text_transform = nn.Linear(t, d)
    self.cross_modal_image_transform = nn.Linear(v, d)
    self.token_type_embeddings = nn.Embedding(2, d)
    for name in ("cross_modal_text_pooler", "cross_modal_image_pooler"):
      self.add_module(name, nn.Module())
      getattr(self, name).dense = nn.Linear(d, d)
    self.vision_proj, self.language_proj = (
      nn.Sequential(
        nn.Linear(d, d),
        nn.LayerNorm(d),
        nn.GELU(),
        nn.Linear(d, model.embed_dim),
      )
      for _ in range(2)
    )
    self.itm_score, self.mlm_score = nn.Module(), nn.Module()
    self.itm_score.fc = nn.Linear(2 * d, 2)
    self.mlm_score.transform = nn.Module()
    self.mlm_score.transform.dense = nn.Linear(d, d)
    self.mlm_score.transform.LayerNorm = nn.LayerNorm(d, eps=1e-12)
    self.mlm_score.decoder = nn.Linear(d, words, bias=False)
    self.mlm_score.bias = nn.Parameter(torch.zeros(words))
    self.cl_temp = nn.Parameter(torch.tensor(0.07))

  def forward(self, video, ids):
    real = (ids != 1).float()
    hidden = (1 - real)[:, None, None] * -10_000.0
    words = self.text_transformer(ids, attention_mask=real).last_hidden_state
    words = self.cross_modal_text_transform(words)
    frames = video.shape[1]
    tokens = self.vision_transformer.visual(video)
    tokens = self.cross_modal_image_transform(tokens)
    out = dict(
      image=self.vision_proj(tokens[:, :frames].mean(1)),
      text=self.language_proj(words[:, 0]),
      tokens=tokens,
      words=words,
    )
    types = self.token_type_embeddings.weight
    x, y = words + types[0], tokens + types[1]
    every = torch.zeros(len(ids), 1, 1, tokens.shape[1])
    for one, other in zip(
      self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True
    ):
      x, y = (
        _first(
          one(
            x,
            attention_mask=hidden,
            encoder_hidden_states=y,
            encoder_attention_mask=every,
          )
        ),
        _first(
          other(
            y,
            attention_mask=every,
            encoder_hidden_states=x,
            encoder_attention_mask=hidden,
          )
        ),
      )
    pooled = [
      torch.tanh(self.cross_modal_text_pooler.dense(x[:, 0])),
      torch.tanh(self.cross_modal_image_pooler.dense(y[:, :frames].mean(1))),
    ]
    head = self.mlm_score
    z = nn.functional.gelu(head.transform.dense(x))
    logits = head.decoder(head.transform.LayerNorm(z)) + head.bias
    match = self.itm_score.fc(torch.cat(pooled, 1))
    return out | dict(fused=x, seen=y, match=match, logits=logits)


def _first(output):
  return output[0] if isinstance(output, tuple) else output


@pytest.fixture(scope="module")
def released():
  torch.manual_seed(0)
  model = Released(two_streams.small(4)).eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.add_(0.2 * torch.randn_like(x) if name != "cl_temp" else 0.1)
  return model


def _arrays(model):
  return {k: v.float().numpy() for k, v in model.state_dict().items()}


def test_a_release_computes_the_same(released):
  params, left_out = convert.from_scl(_arrays(released), two_streams.small(4))
  assert {name.split(".")[1] for name in left_out} <= {"pooler", "embeddings"}
  draw = np.random.default_rng(0)
  image = draw.integers(0, 256, (2, FRAMES, 12, 12, 3), dtype=np.uint8)
  text = draw.integers(3, 23, (2, L)).astype(np.int32)
  text[1, 3:] = 1
  got = _call(4)(params, image, text, LENGTHS, None)
  pixels = np.array(patches_lib.normalize(image)).transpose(0, 1, 4, 2, 3)
  with torch.no_grad():
    want = released(torch.tensor(pixels), torch.tensor(text).long())
  for name, x in want.items():
    x = x.numpy()
    if name in ("image", "text"):
      x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for i, length in enumerate(LENGTHS):
      real = slice(length if name in ("words", "fused", "logits") else None)
      np.testing.assert_allclose(
        *(got[name][i][real], x[i][real]), rtol=1e-5, atol=2e-5, err_msg=name
      )


def test_positions_are_resized_as_pytorch_does():
  table = np.random.default_rng(0).normal(size=(14 * 14, 4))
  table = table.astype(np.float32)
  for side in (12, 18, 24, 36):
    grid = torch.tensor(table).reshape(1, 14, 14, 4).permute(0, 3, 1, 2)
    want = nn.functional.interpolate(
      grid, (side, side), mode="bicubic", align_corners=False
    )
    want = want.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    got = patches_lib.resize_positions(table, (14, 14), (side, side))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_lightning(released, tmp_path, monkeypatch):
  """Its callbacks are named by their classes, none of which is run."""
  name = "pytorch_lightning.callbacks.model_checkpoint"
  module = types.ModuleType(name)
  module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
  for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
  monkeypatch.setitem(sys.modules, name, module)
  checkpoint = {
    "epoch": 41,
    "global_step": 99_999,
    "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.ones(())}},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    "hyper_parameters": {"config": {"exp_name": "scl"}},
    "state_dict": released.state_dict(),
  }
  torch.save(checkpoint, tmp_path / "scl.ckpt")
  for parent in (name, "pytorch_lightning.callbacks", "pytorch_lightning"):
    monkeypatch.delitem(sys.modules, parent)
  read = state_dict.read(str(tmp_path / "scl.ckpt"))
  toys.assert_trees_equal(read, _arrays(released))


def test_a_program_is_refused(tmp_path):
  traced = torch.jit.script(QuickGELU())
  traced.save(str(tmp_path / "clip.pt"))
  with pytest.raises(UserError, match="is a program and not a state dict"):
    state_dict.read(str(tmp_path / "clip.pt"))
