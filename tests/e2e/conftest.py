"""What runs of commands share."""

import pytest


@pytest.fixture(scope="session")
def scenes():
  """The embedded pictures are there: no command has to say it makes them."""
  from vlp_jax.data.builders import scenes

  scenes.ensure_built("scenes/debug")
