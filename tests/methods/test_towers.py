"""What every method asks of its towers, before anything is built."""

import pytest

from tests import toys
from vlp_jax.errors import UserError
from vlp_jax.methods import base

METHODS = base.available()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
  ("item", "message"),
  [
    ("positions=rope", "positions is 'rope', not one of learned, sincos"),
    ("stem=conv", "stem is 'conv', not one of linear, hmlp"),
    ("patch_size=12", "stem=hmlp needs .* 4, 8, 16 or 32, not 12"),
    ("width=18", "sincos positions need .*vision.width % 4 == 0"),
  ],
)
def test_vision_sections_are_checked(name, item, message):
  items = [f"model.vision.{item}"]
  if item == "patch_size=12":  # more than one patch, for masks
    items.append("data.image_size=36")
  if name == "simla" and item == "width=18":  # patches go through the stream
    items.append("model.stream.width=18")
  with pytest.raises(UserError, match=message):
    toys.method(name, *items)
