"""What is made of compute-sanitizer's exit status and output, whose lines are those of its manual."""

import pytest
import sanitize


@pytest.mark.parametrize(
    ("status", "output", "is_fine", "said"),
    [
        (0, "5 passed\n========= ERROR SUMMARY: 0 errors", True, "ERROR SUMMARY: 0 errors"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", True, "RACECHECK SUMMARY: 0 hazards"),
        (86, "========= Invalid __global__ write of size 4 bytes", False, "Invalid __global__ write"),
        (86, "========= Error: Device not supported.\n========= error 999 on cuMemAlloc", True, "not checked"),
        (1, "1 failed\n========= ERROR SUMMARY: 0 errors", False, "1 failed"),
        (0, "5 passed", False, "failed with status 0"),
    ],
)
def test_verdict(status, output, is_fine, said):
    found = sanitize.verdict(status, output)
    assert found[0] is is_fine
    assert said in found[1]
