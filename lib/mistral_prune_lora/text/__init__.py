"""Text and the windows of token ids that are cut from it."""
