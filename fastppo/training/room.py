"""Whether the disk has room for what a run will write, before the run takes hours."""

from __future__ import annotations

import shutil
from pathlib import Path

from fastppo.training.config import RunConfig
from fastppo.training.errors import StartError


def check_room(
    run_dir: Path, args: RunConfig, model: int, checkpoint: int, iterations: int
) -> list[str]:
    """Compare what is free on the file system of a run directory with what will be written.

    One more checkpoint than are kept is there while it is written. What a resumed run replaces
    counts as free.

    Args:
        run_dir: exists.
        args: how many checkpoints are written and kept.
        model: bytes of the weights that are saved at the end.
        checkpoint: bytes of the tensors of one.
        iterations: finished ones.

    Returns:
        A note, where there is room for the model and one checkpoint but not for all.

    Raises:
        StartError: there is no room for those.
    """
    disk = shutil.disk_usage(run_dir)
    if not disk.total:  # a file system that does not say
        return []
    every = args.save_interval
    due = args.num_iterations // every - iterations // every if every else 0
    most = min(due, args.keep_checkpoints + args.keep_best + 1)
    free = disk.free + sum(
        path.stat().st_size
        for name in ("checkpoints", "model")
        for path in (run_dir / name).rglob("*")
        if path.is_file()
    )
    where = f"on the file system of {run_dir}"
    least, all_of_it = model + min(due, 1) * checkpoint, model + most * checkpoint
    what = f"a model of {_size(model)}" + f" and a checkpoint of {_size(checkpoint)}" * (due > 0)
    if free < least:
        raise StartError(
            f"output_dir: expected room for {what} {where}, got {_size(free)}. Free some space, "
            "choose another output_dir, or set train_layers or lora_rank for smaller checkpoints"
        )
    if free < all_of_it:
        return [
            f"{_size(free)} are free {where}, and {_size(all_of_it)} will be needed: a model of "
            f"{_size(model)} and {most} checkpoints of {_size(checkpoint)}. Lower keep_checkpoints "
            "or keep_best, or free some space"
        ]
    return []


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
