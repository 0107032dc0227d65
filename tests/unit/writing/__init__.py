"""Writing: bytes equal to their sources', and all of it or nothing, whatever fails."""

import pytest

pytest.register_assert_rewrite(f"{__name__}.steps")
