"""The dense model that everything starts from, fetched, converted and checked."""
