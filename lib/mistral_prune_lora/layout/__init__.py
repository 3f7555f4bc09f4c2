"""Which layer is whose: parts, stages and the segments that stages share. Imports no torch."""
