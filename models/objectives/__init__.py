"""What each stage minimises. `objective(model, batch) -> (loss, metrics)` does it in one go; the
training engine does the same in micro-batches and pipeline stages (`models.objectives.common`)."""
