"""A checkpoint of its ranks' files alone: whole, checked, and merged again byte for byte."""

import pytest

pytest.register_assert_rewrite(f"{__name__}.compiled")
