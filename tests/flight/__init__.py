"""What `tests/fly.py` is made of: the steps of a flight, what runs them, and the programs that only it needs."""
