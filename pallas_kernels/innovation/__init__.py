"""How far a state is from the mean of those before it. See `api.py`."""
