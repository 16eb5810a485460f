"""Layer 5: when a stage runs, where, how often, and what people see of it. No maths."""

if __name__ != "vlfoundry.flows":
    raise ImportError("import vlfoundry.flows: under two names every module is there twice")
