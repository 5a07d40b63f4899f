"""The run directory and the checkpoints in it: every file complete or absent, also after a kill.

run_dir.py   the folder of a run, its JSON files, the saved model
lock.py      one process per run directory
format.py    one checkpoint: its files, its manifest, what makes it valid
store.py     many checkpoints: saved in the background, pruned, swept, found again
durable.py   what it takes until a file survives a power cut
"""

from fastppo.checkpoint.durable import delete
from fastppo.checkpoint.format import Checkpoint, CheckpointError, verify
from fastppo.checkpoint.lock import RunInUseError, lock_run_dir
from fastppo.checkpoint.run_dir import new_run_dir, rehearse_model, save_model, write_json
from fastppo.checkpoint.store import CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "RunInUseError",
    "delete",
    "lock_run_dir",
    "new_run_dir",
    "rehearse_model",
    "save_model",
    "verify",
    "write_json",
]
