"""What good means: suites, metrics, references without learning, and the report's page.

Nothing is imported here, so that the command line stays fast.
"""

if __name__ != "vlfoundry.eval":
    raise ImportError("import vlfoundry.eval: under two names every module is there twice")
