"""Layers that come and go while all windows pass through them."""
