"""What only the rules and their scripts use."""
