"""RMS norm of heads and rotary positions, in one pass. See `api.py`."""
