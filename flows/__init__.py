"""Layer 5: when a stage runs, where, how often, and what people see of it. No maths."""
