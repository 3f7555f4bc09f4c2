"""What numbers mean: statistics, tables and figures. Imports no torch."""
