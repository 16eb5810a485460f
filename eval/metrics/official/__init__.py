"""Metrics as the public benchmarks' own scripts count them, quirks included.

`eval/metrics` holds what our suites report; a number for a published table comes from here. Plain
functions on numbers and texts. Where a script has a defect, the right count is the default and
`compat` asks for the script's.
"""
