"""The short convolution before the scan, with its SiLU. See `api.py`."""
