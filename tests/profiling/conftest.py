"""Kineto reads this when the first profiler starts; it would tell stderr of each start and stop."""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
