"""Keys and values of new tokens into the rings that decoding caches. See `api.py`."""
