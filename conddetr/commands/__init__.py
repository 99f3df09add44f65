"""The commands of `conddetr`, one file each, imported only when the command runs.

`parser.py` has the flags of all commands and imports no PyTorch, so help and errors about flags appear at once.
"""
