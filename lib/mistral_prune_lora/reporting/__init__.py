"""Pages of the report: what was pruned, healed and measured, as HTML that needs nothing else. Imports no torch."""
