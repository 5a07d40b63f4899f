"""Two ways to test kernels without a GPU, which one process cannot mix.

Triton decides at import whether kernels are interpreted. `interpreted/` runs them on the CPU and
needs TRITON_INTERPRET=1 before Triton is imported; `test_interpreted.py` runs that folder in a
process of its own. `test_aot.py` compiles and needs the variable unset. So plain `pytest` runs
both, and `TRITON_INTERPRET=1 pytest tests/kernels/interpreted` one of them, with a debugger.
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_aot.py", "test_interpreted.py"] if INTERPRETED else ["interpreted"]
