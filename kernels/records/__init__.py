"""Records of proven kernels, which decide the kernels that `backend="auto"` may use on a GPU.

A kernel is proven on a GPU by a check that ran there (`conddetr check`), whose record is in the user's cache folder,
or by measurements of its architecture that this package ships in `measured/`. The record takes precedence. On CPUs the
test suite proves the kernels: a record is only for reading there.

A record is valid while its `identity` equals the current one. It is read once per process and GPU model. After another
process has written a record, or CONDDETR_CACHE has changed, call `forget` to read it again. Code compiled by
torch.compile keeps the decisions of its compilation.

| file | content |
|---|---|
| `content.py` | verdicts, records and tables, and the text of their files |
| `machine.py` | the identity on which a record depends |
| `files.py` | paths of records, reading and writing |
| `memory.py` | the records of this process |
| `proof.py` | the kernels that `auto` may use |
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
