"""The report: what a run did and what came of it, as facts (JSON) and as one page (HTML)."""
