"""These tests need null GPUs; `tests/test_null_gpu.py` runs them in a process that has some."""

import null_gpu

collect_ignore_glob = [] if null_gpu.IS_RUNNING else ["test_*.py"]
