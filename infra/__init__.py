"""Layer 1: what everything stands on. Imports nothing of ours."""

if __name__ != "vlfoundry.infra":
    raise ImportError("import vlfoundry.infra: under two names every module is there twice")
