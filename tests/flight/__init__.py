"""The parts of `tests/fly.py`: the steps of a flight, their runner, and the programs of some steps."""
