"""The GPU that torch sees, as JSON: ``python -m mixprec_runtime.gpu``.

Runs in a separate process, so that ``mixprec doctor`` needs no torch and survives one that cannot be imported.
"""

from __future__ import annotations

import json

__all__ = ["main"]


def main() -> None:
    """Prints ``{"name", "capability"}`` of the first GPU (90 is compute capability 9.0), or ``{"missing": why}``."""
    try:
        import torch
    except ImportError:
        found: dict[str, object] = {"missing": "not known without torch"}
    else:
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            found = {"name": torch.cuda.get_device_name(), "capability": 10 * major + minor}
        else:
            found = {"missing": "torch finds none"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
