"""Pruning, merging and calibration text: the module paths of the command line."""
