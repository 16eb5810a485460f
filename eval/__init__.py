"""What good means: suites, metrics, references without learning, and the report's page.

Nothing is imported here, so that the command line stays fast.
"""
