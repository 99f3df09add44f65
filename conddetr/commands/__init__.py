"""The commands of `conddetr`, one file each: what it imports is loaded when the command is run.

`parser.py` has the flags of all commands and imports no PyTorch, so that help and a wrong flag answer at once.
"""
