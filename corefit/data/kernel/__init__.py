"""The C kernel, where one was built. Every function of it has a twin in Python that gives the same bits."""

from __future__ import annotations

import os
from types import ModuleType

from corefit.errors import UserError, unknown

compiled: ModuleType | None = None
"""The extension; None where no compiler was at hand, or ``COREFIT_KERNEL=python`` asks for the twins."""

if (_asked := os.environ.get("COREFIT_KERNEL", "c")) not in ("c", "python", ""):
    raise UserError(f"COREFIT_KERNEL: {unknown('kernel', _asked, ('c', 'python'))}")
if _asked != "python":
    try:
        from corefit.data.kernel import _kernel as compiled
    except ImportError:
        pass

NAME = "C" if compiled else "Python"
"""Which one is active."""
