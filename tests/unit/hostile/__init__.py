"""What untrusted people may put into a source, a recipe or a compiled checkpoint, by theme."""

import pytest

pytest.register_assert_rewrite(f"{__name__}.spoil")
