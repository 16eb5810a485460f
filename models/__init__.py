"""What is trained: the model families, their four compositions, and the losses."""

if __name__ != "vlfoundry.models":
    raise ImportError("import vlfoundry.models: under two names every module is there twice")
