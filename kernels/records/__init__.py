"""Which kernels are proven, and where: what `backend="auto"` may take on a GPU.

A kernel is proven on a GPU by a check that ran there (`conddetr check`), whose record lies in the user's cache folder,
or by measurements of its architecture that this package ships in `measured/`. The record comes first. On CPUs the test
suite proves the kernels: a record is only for reading there.

A record counts as long as its `identity` is the present one. It is read once per process and GPU model; after another
process has written one, or CONDDETR_CACHE has changed, `forget` lets it be read again. Code that torch.compile has
compiled keeps what held when it was compiled.

| file | what it is |
|---|---|
| `content.py` | verdicts, records and tables, and the text of their files |
| `machine.py` | what a record depends on |
| `files.py` | where records lie, reading and writing |
| `memory.py` | what this process knows |
| `proof.py` | what `auto` may take |
"""

from conddetr.kernels.records.content import Record, Table, Verdict
from conddetr.kernels.records.files import folder, path
from conddetr.kernels.records.machine import compute_capability, device_name, identity
from conddetr.kernels.records.memory import (
    adopt,
    forget,
    known,
    load,
    pretend,
    remembered,
    restricted,
    save,
    why_ignored,
)
from conddetr.kernels.records.proof import source, verdict, why_not

__all__ = [
    "Record",
    "Table",
    "Verdict",
    "adopt",
    "compute_capability",
    "device_name",
    "folder",
    "forget",
    "identity",
    "known",
    "load",
    "path",
    "pretend",
    "remembered",
    "restricted",
    "save",
    "source",
    "verdict",
    "why_ignored",
    "why_not",
]
