"""The fading memory: a selective state-space scan. See `api.py`."""
