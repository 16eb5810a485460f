"""Where and how wide a step runs."""
