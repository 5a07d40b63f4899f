"""Two ways to test kernels without a GPU, which one process cannot mix.

Triton decides at import whether kernels are interpreted. `interpreted/` runs them on the CPU and
needs TRITON_INTERPRET=1 before Triton is imported; `test_interpreted.py` runs that folder in a
process of its own. `test_aot.py` compiles and needs the variable unset. So plain `pytest` runs
both, and `TRITON_INTERPRET=1 pytest tests/kernels/interpreted` one of them, with a debugger.

`interpreted/test_head_modes.py` also runs on a GPU, where there is one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    collect_ignore = ["test_aot.py", "test_interpreted.py"]
elif torch.cuda.is_available():
    files = Path(__file__).parent.glob("interpreted/test_*.py")
    collect_ignore = [f"interpreted/{f.name}" for f in files if f.name != "test_head_modes.py"]
else:
    collect_ignore = ["interpreted"]
