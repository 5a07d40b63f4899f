"""verl 0.9: `FusedLinearForPPO`, its default fused head: a loop over 512 rows at a time in torch.

Its file is loaded by path: `import verl` needs ray and tensordict, which the head does not.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from torch import Tensor

NEEDS = ("verl",)
_FILE = "utils/experimental/torch_functional.py"


@lru_cache(maxsize=1)
def _module() -> ModuleType:
    package = importlib.util.find_spec("verl")
    folders = [] if package is None else package.submodule_search_locations or []
    path = next((p for p in (Path(folder) / _FILE for folder in folders) if p.is_file()), None)
    if path is None:
        raise ImportError(f"verl: no {_FILE} in it; pip install --no-deps verl==0.9.0")
    name = "verl_torch_functional"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chunked_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) in float32 and entropies (N,) in the dtype of `hidden` (N, H)."""
    logprobs, entropy = _module().FusedLinearForPPO()(hidden, weight, targets)
    return logprobs, entropy
