"""What each stage minimises: `objective(model, batch) -> (loss, metrics)`."""
