"""Attention of new tokens to the keys that decoding caches. See `api.py`."""
