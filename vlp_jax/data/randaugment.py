"""RandAugment (Cubuk et al., 2020) with the operations of ALBEF and SIMLA.

Colour operations are left out, since captions name colours. Pictures are uint8
throughout; what is moved in leaves grey of 128 behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_GREY = (128, 128, 128)
_LARGEST = 10  # magnitude


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """Some operations, drawn with replacement, each done or not.

  Attributes:
    num_ops: operations drawn.
    magnitude: of 10, where brightness and sharpness are 1.9 times as high,
      shear is 0.3, shifts are 10 pixels and turns 30 degrees.
    probability: that a drawn operation is done.
  """

  num_ops: int = 2
  magnitude: float = 7
  probability: float = 0.5

  def __call__(
    self, pixels: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """Returns uint8 `[H, W, 3]`, as `pixels` is."""
    image = Image.fromarray(pixels)
    names = rng.integers(len(OPERATIONS), size=self.num_ops)
    done = rng.random(self.num_ops) < self.probability
    signs = rng.choice([-1.0, 1.0], self.num_ops)
    for number, sign in zip(names[done], signs[done], strict=True):
      operation = tuple(OPERATIONS.values())[number]
      image = operation(image, self.magnitude / _LARGEST, sign)
    return np.asarray(image)


def _identity(image: Image.Image, strength: float, sign: float) -> Image.Image:
  del strength, sign
  return image


def _auto_contrast(
  image: Image.Image, strength: float, sign: float
) -> Image.Image:
  """Stretches each channel to [0, 255]."""
  del strength, sign
  return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, strength: float, sign: float) -> Image.Image:
  """Makes the levels of each channel about equally frequent."""
  del strength, sign
  return ImageOps.equalize(image)


def _brightness(
  image: Image.Image, strength: float, sign: float
) -> Image.Image:
  del sign
  return ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * strength)


def _sharpness(image: Image.Image, strength: float, sign: float) -> Image.Image:
  del sign
  return ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * strength)


def _shear_x(image: Image.Image, strength: float, sign: float) -> Image.Image:
  return _affine(image, (1, -sign * 0.3 * strength, 0, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float, sign: float) -> Image.Image:
  return _affine(image, (1, 0, 0, -sign * 0.3 * strength, 1, 0))


def _translate_x(
  image: Image.Image, strength: float, sign: float
) -> Image.Image:
  return _affine(image, (1, 0, -sign * 10 * strength, 0, 1, 0))


def _translate_y(
  image: Image.Image, strength: float, sign: float
) -> Image.Image:
  return _affine(image, (1, 0, 0, 0, 1, -sign * 10 * strength))


def _rotate(image: Image.Image, strength: float, sign: float) -> Image.Image:
  """Turns about the middle, to the left where the sign is positive."""
  return image.rotate(
    sign * 30 * strength, Image.Resampling.BILINEAR, fillcolor=_GREY
  )


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  """Samples at (ax + by + c, dx + ey + f) for each pixel's middle (x, y)."""
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix,
    Image.Resampling.BILINEAR,
    fillcolor=_GREY,
  )


# Each takes a picture, the strength in [0, 1] and a sign. Their order counts.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
  "identity": _identity,
  "auto_contrast": _auto_contrast,
  "equalize": _equalize,
  "brightness": _brightness,
  "sharpness": _sharpness,
  "shear_x": _shear_x,
  "shear_y": _shear_y,
  "translate_x": _translate_x,
  "translate_y": _translate_y,
  "rotate": _rotate,
}
