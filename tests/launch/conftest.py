"""A cloud for each test."""

import pytest

from tests.launch import tools


@pytest.fixture
def cloud(tmp_path):
  """Stand-ins whose state, and whose working directory, are the test's own."""
  (tmp_path / "cloud").mkdir()
  return tools.Cloud(tmp_path)
