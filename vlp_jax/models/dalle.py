"""The encoder of DALL-E's discrete VAE: pictures to logits over codes.

Ramesh et al. 2021, "Zero-shot text-to-image generation", section 2.1 and
appendix A; sizes and names as in the weights that OpenAI released, which
`vlp_jax.convert.dalle` turns into parameters of this module.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

GROUPS = 4
# Rows (and columns) of pixels that one code stands for.
STRIDE = 2 ** (GROUPS - 1)
# Of a block's branch: 1 / (number of blocks)^2 in the released encoder.
_GAIN = 1 / 64


class DalleBlock(nn.Module):
  """Four convolutions and what they are added to.

  Only the input of each convolution is rounded to `dtype`. The stream stays
  float32: a branch counts 1/64, and would fall off the end of a bfloat16.

  Attributes:
    width: channels that come out.
    dtype: of the convolutions.
  """

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to float32 `[B, H, W, width]`."""
    hidden = self.width // 4
    branch = x
    for i, (width, size) in enumerate(
      [(hidden, 3), (hidden, 3), (hidden, 3), (self.width, 1)], 1
    ):
      branch = nn.relu(branch)
      branch = _conv(width, size, self.dtype, f"conv_{i}")(branch)
    if x.shape[-1] != self.width:
      x = _conv(self.width, 1, self.dtype, "id_path")(x)
    return x.astype(jnp.float32) + _GAIN * branch.astype(jnp.float32)


class DalleEncoder(nn.Module):
  """Convolutions in four groups, each but the last halved in size.

  The defaults are the released encoder: 53,786,240 parameters, 34 billion
  multiplications for a picture of 128 x 128.

  Attributes:
    width: channels of the first group; each group doubles them.
    blocks: blocks in each group.
    vocab_size: codes V.
    dtype: of the convolutions but the last, which is float32, as released.
  """

  width: int = 256
  blocks: int = 2
  vocab_size: int = 8192
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Scores the codes of each square of 8 x 8 pixels.

    Args:
      pixels: float32 `[B, H, W, 3]` in [0, 1]; sides are multiples of 8.

    Returns:
      float32 logits `[B, H / 8, W / 8, V]`.
    """
    # The range that its decoder's logit-Laplace likelihood is made for.
    x = 0.8 * pixels + 0.1
    x = _conv(self.width, 7, self.dtype, "input")(x)
    for group in range(GROUPS):
      if group:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for block in range(self.blocks):
        name = f"group_{group + 1}_block_{block + 1}"
        x = DalleBlock(self.width * 2**group, self.dtype, name=name)(x)
    # Three products of bfloat16 on a TPU: what the other three would add is far
    # below what the convolutions before have rounded.
    output = _conv(self.vocab_size, 1, jnp.float32, "output", "high")
    return output(nn.relu(x))


def _conv(
  width: int, size: int, dtype: Any, name: str, precision: str | None = None
) -> nn.Conv:
  return nn.Conv(
    width, (size, size), dtype=dtype, precision=precision, name=name
  )
