"""What every trainer shares: a run that survives, optimisers, devices, memory, seeds, metrics."""
