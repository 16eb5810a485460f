"""What a rule of the funnel measures."""
