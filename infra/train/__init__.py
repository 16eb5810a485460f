"""One training loop for every stage: schedule, optimizer, checkpoints, canonical weights."""
