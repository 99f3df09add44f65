"""Predictions from machine code: each part against answers worked out by hand, and the committed table."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the disassembler comes with the package triton, which is not installed")

import torch
from null_gpu.counts import Launch

from conddetr.kernels.attn.triton.launch import Tiles, launch_settings, read_tiles
from counts import counting
from gpu_model import (
    blocks,
    cuda_code,
    figures,
    hot_path,
    machine_code,
    partition,
    pipes,
    problems,
    ranking,
    remarks,
    stored,
)
from gpu_model.control_flow import Flow
from gpu_model.hot_path import Hints, HotPathError
from ops.attn import Problem
from tools import aot_cuda

ROOT = Path(__file__).parents[3]
COMMITTED = stored.read(stored.FOLDER / "predictions.json")
PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry powers_kernel(.param .u64 out, .param .u32 count) {
  .reg .f32 %x, %y; .reg .u64 %to; .reg .u32 %i, %n; .reg .pred %again;
  ld.param.u64 %to, [out];
  ld.param.u32 %n, [count];
  mov.u32 %i, 0;
  mov.f32 %x, 0f3F800000;
LOOP:
  .pragma "nounroll";
  ex2.approx.ftz.f32 %y, %x;
  add.f32 %x, %y, %x;
  add.u32 %i, %i, 1;
  setp.lt.u32 %again, %i, %n;
  @%again bra LOOP;
  st.global.f32 [%to], %x;
  ret;
}
"""


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """What Triton's assembler makes of a loop of exponentials."""
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "powers.ptx").write_text(PTX)
    assembler = aot_cuda.find_cuobjdump().with_name("ptxas")
    subprocess.run([assembler, "-arch", "sm_90", "powers.ptx", "-o", "powers.cubin"], cwd=folder, check=True)
    return (folder / "powers.cubin").read_bytes()


def test_machine_code_is_read(assembled):
    [(name, function)] = machine_code.read(assembled).items()
    assert name == "powers_kernel"
    assert [i.address for i in function.code] == list(range(0, 16 * len(function.code), 16))
    [power] = [i for i in function.code if i.operation == "MUFU.EX2"]
    # Its result comes when it comes: what adds it waits for the scoreboard that it keeps busy.
    [added] = [i for i in function.code if i.name == "FADD" and power.control.sets in i.control.waits]
    assert added.address > power.address
    assert all(0 <= i.control.stall <= 15 for i in function.code)
    usage = machine_code.resources(assembled)[name]
    assert 0 < usage["REG"] <= 16
    assert usage["STACK"] == 0


def test_a_loop_is_found_and_gone_through(assembled):
    function = machine_code.read(assembled, "powers_kernel")["powers_kernel"]
    path = hot_path.find(function, Hints(exponentials=1))
    assert path.is_loop
    assert [i.operation for i in path.main if i.name in ("MUFU", "STG")] == ["MUFU.EX2"]
    assert path.main[-1].name == "BRA"
    assert path.main[-1].target == path.main[0].address
    with pytest.raises(HotPathError, match=r"1 exponentials in a trip of the loop at 0x.*, expected 32"):
        hot_path.find(function, Hints(exponentials=32))


def test_machine_code_of_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="cannot read the machine code"):
        machine_code.read(b"nothing")


def function(*lines):
    """A function of instructions `@P0 BRA 0x30`, each 16 bytes on, without control codes."""
    code = "\n".join(f"  /*{16 * i:04x}*/ {line} ; /* 0x{0:016x} */\n /* 0x{0:016x} */" for i, line in enumerate(lines))
    [found] = machine_code.parse(f"\tFunction : some_kernel\n{code}\n").values()
    return found


def names(path):
    return [instruction.name for instruction in path]


PRODUCT = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
POWER = "MUFU.EX2 R4, R4"


def test_the_way_with_copies_and_without_masks_is_hot():
    found = function(
        "MOV R1, R2",
        "@P0 BRA 0x30",  # the loop begins; past the last tile nothing is copied
        "LDGSTS.E.128 [R1], [R2.64]",
        PRODUCT,
        "@!P1 BRA 0x70",  # only at the edge
        "FSEL R4, R4, R5, P2",
        "FSEL R4, R4, R5, P3",
        POWER,
        "@P4 BRA 0x10",
        "EXIT",
    )
    path = hot_path.find(found, Hints(exponentials=1))
    assert names(path.main) == ["BRA", "LDGSTS", "HMMA", "BRA", "MUFU", "BRA"]
    assert path.tail == []
    without = hot_path.find(found, Hints(exponentials=1, avoids=("LDGSTS",)))
    assert names(without.main) == ["BRA", "HMMA", "BRA", "MUFU", "BRA"]


def test_what_lies_behind_the_loop_for_lanes_that_part_is_no_loop():
    found = function(
        PRODUCT,
        "BRA.DIV UR4, 0x50",
        POWER,
        "@P0 BRA 0x0",
        "EXIT",
        "SHFL.BFLY PT, R4, R4, 0x1, 0x1f",
        "BRA 0x20",
        "BRA 0x70",
    )
    [loop] = Flow(found).loops
    assert loop.body == {0, 1}
    assert names(hot_path.find(found, Hints(exponentials=1)).main) == ["HMMA", "BRA", "MUFU", "BRA"]


def test_the_second_loop_of_the_kind_is_for_the_edge():
    lines = [PRODUCT, POWER, "@P0 BRA 0x0", PRODUCT, "FSEL R4, R4, R5, P2", POWER, "@P0 BRA 0x30", "EXIT"]
    path = hot_path.find(function(*lines), Hints(exponentials=1))
    assert names(path.main) == ["HMMA", "MUFU", "BRA"]
    assert names(path.tail) == ["HMMA", "FSEL", "MUFU", "BRA"]
    three = [*lines[:-1], PRODUCT, POWER, "@P0 BRA 0x70", "EXIT"]
    with pytest.raises(HotPathError, match="main loops at 0x0, 0x30, 0x70"):
        hot_path.find(function(*three), Hints(exponentials=1))


NESTED = (
    "IADD3 R1, R1, R2, RZ",
    PRODUCT,
    POWER,
    "@P0 BRA 0x10",
    "LDS R4, [R1]",
    "@P1 BRA 0x40",
    "@P2 BRA 0x0",
    "EXIT",
)


def test_inner_loops_are_gone_through_until_there_are_enough_exponentials():
    path = hot_path.find(function(*NESTED), Hints(exponentials=3))
    assert names(path.main) == ["IADD3", *3 * ["HMMA", "MUFU", "BRA"], "LDS", "BRA", "BRA"]
    told = hot_path.find(function(*NESTED), Hints(exponentials=3, trips=(3, 2)))
    assert names(told.main) == ["IADD3", *3 * ["HMMA", "MUFU", "BRA"], *2 * ["LDS", "BRA"], "BRA"]
    with pytest.raises(HotPathError, match="trips of 1 inner loops, found 0x10, 0x40"):
        hot_path.find(function(*NESTED), Hints(trips=(3,)))
    inner = hot_path.find(function(*NESTED), Hints(exponentials=1, depth=1))
    assert names(inner.main) == ["HMMA", "MUFU", "BRA"]


def test_a_loop_that_is_left_in_its_middle_is_gone_through_as_often():
    """Through a call that does not come back, as nvcc has it for sm_80."""
    lines = ["IADD3 R1, R1, R2, RZ", PRODUCT, POWER, "@P0 CALL.REL.NOINC 0x50", "BRA 0x10", "@P2 BRA 0x0", "EXIT"]
    path = hot_path.find(function(*lines), Hints(exponentials=2))
    once = ["HMMA", "MUFU", "CALL"]
    assert names(path.main) == ["IADD3", *once, "BRA", *once, "BRA"]


def test_products_in_an_inner_loop_need_to_be_told():
    lines = ["MOV R1, R2", PRODUCT, "@P0 BRA 0x10", POWER, "@P1 BRA 0x0", "EXIT"]
    with pytest.raises(HotPathError, match="nothing tells the trips of the loop of products at 0x10"):
        hot_path.find(function(*lines), Hints(exponentials=1))


def test_without_a_loop_all_of_it_is_the_path():
    path = hot_path.find(function("LOP3.LUT R1, R2, R3, RZ", "STG.E [R4], R1", "EXIT", "BRA 0x30"), Hints())
    assert not path.is_loop
    assert names(path.main) == ["LOP3", "STG", "EXIT"]


def path(*lines):
    """Instructions `FADD R1, R2 | stall 2, sets 0, reads 1, waits 0 3`, by default with one clock of stall."""
    found = []
    for line, text in zip(function(*(line.split(" | ")[0] for line in lines)).code, lines, strict=True):
        codes = {"stall": ["1"], "sets": [None], "reads": [None], "waits": []}
        for word in text.split(" | ")[1].split(", ") if " | " in text else ():
            name, *values = word.split()
            codes[name] = values
        stall, sets, reads = (None if codes[name][0] is None else int(codes[name][0]) for name in list(codes)[:3])
        control = machine_code.Control(stall, sets, reads, tuple(map(int, codes["waits"])))
        found.append(replace(line, control=control))
    return found


def clocks(lines, warps=4, on=1):
    """Of one warp's trip."""
    return partition.simulate(path(*lines), warps, on, stagger=0.0)


ADD, LOGIC = "FADD R1, R2, R3", "LOP3.LUT R1, R2, R3, RZ"


def test_units_take_as_long_as_they_are_wide():
    # Two halves with two clocks each; one alone; a queue of the special-function unit fills up once.
    assert clocks(8 * [ADD]) == 8
    assert clocks(8 * [LOGIC]) == 16
    assert clocks([LOGIC, ADD]) == 2
    assert clocks(["MUFU.EX2 R1, R1"], on=4) == pytest.approx(8, abs=0.5)
    assert clocks([PRODUCT], on=4) == pytest.approx(pipes.HMMA)
    # The false one only takes its turn.
    assert clocks(["@!PT LOP3.LUT R1, R2, R3, RZ"], on=4) == 1


def test_stalls_and_scoreboards_make_a_warp_wait():
    assert clocks([f"{ADD} | stall 5"]) == 5
    # Other warps go on meanwhile.
    assert clocks([f"{ADD} | stall 5"], on=4) == pytest.approx(5 / 4)
    loaded = ["LDS R1, [R2] | stall 2, sets 0", f"{ADD} | waits 0"]
    # From its beginning to its end, a clock for its one pass, and the add's own.
    assert clocks(loaded) == pipes.LATENCY["LDS"] + 1 + 1
    assert clocks(loaded, on=5) == pytest.approx((pipes.LATENCY["LDS"] + 2) / 5)
    # Without a wait only the stalls count.
    assert clocks([loaded[0], ADD]) == 2 + 1


def test_shared_memory_is_shared_by_four_quarters():
    # 512 bytes of each quarter in turn, and nothing else takes as long.
    assert clocks(["LDS.128 R4, [R2] | sets 0", f"{ADD} | waits 0"], on=8) == pytest.approx(16)
    assert pipes.needs(path("LDS.128 R4, [R2]", "LDSM.16.M88.4 R4, [R2]", "SHFL.BFLY PT, R1, R1, 0x1, 0x1f")) == {
        "issue": 3, "fma": 0, "alu": 0, "xu": 0, "tensor": 0, "shared": 4 * (4 + 4 + 1),
    }  # fmt: skip


def test_needs_of_products_and_of_integers():
    group = "HGMMA.64x32x16.F32.BF16 R56, R88, gdesc[UR4].tnspB, R56, gsb0"
    both = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT"
    found = pipes.needs(path(group, both, "IMAD R1, R2, R3, R4", "FFMA R1, R2, R3, R4", "FFMA R1, R2, R3, R4"))
    # 64 × 32 × 16 products at 512 a clock and quarter; a tile of 16-bit numbers at 128 bytes a clock.
    assert found["tensor"] == 16 + 32
    assert found["shared"] == 32 * 16 * 2 / 128 + (64 + 64) * 16 * 2 / 128
    assert found["fma"] == 3
    assert pipes.needs(path("HMMA.1688.F32.BF16 R4, R8, R12, R4"))["tensor"] == pipes.HMMA / 2
    assert pipes.needs(path("HMMA.1688.F32.TF32 R4, R8, R12, R4"))["tensor"] == pipes.HMMA


def test_copies_are_waited_for_by_groups():
    def trip(left):
        return ["LDGSTS.E.128 [R1], [R2.64]", "LDGDEPBAR", f"DEPBAR.LE SB0, 0x{left}", f"{ADD} | stall 15"]

    alone = clocks(trip(0))
    assert alone == pipes.LATENCY["LDGSTS"] + 1 + 15
    # With two under way a trip waits for the copy of two trips before: a third of the time is left.
    assert clocks(trip(2)) == pytest.approx(alone / 3, rel=0.15)
    # Products of warpgroups likewise.
    product = ["HGMMA.64x64x16.F32.BF16 R24, R72, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    assert clocks(product) == 32 + pipes.LATENCY["HGMMA"] + 1


def test_a_barrier_opens_after_the_last_warp():
    lines = ["BAR.SYNC.DEFER_BLOCKING 0x0", f"{ADD} | stall 3"]
    assert clocks(lines) == pipes.BARRIER + 3
    # Two warps of a block arrive one after the other.
    assert 2 * clocks(lines, warps=8) == pytest.approx(pipes.BARRIER + 4, abs=1)
    assert 2 * clocks(lines, on=2) == pytest.approx(pipes.BARRIER + 3, abs=1)


def test_fences_of_the_gpu_take_longer():
    assert clocks(["MEMBAR.ALL.CTA"]) == pipes.FENCE
    assert clocks(["MEMBAR.SC.GPU"]) == pipes.FENCE_OF_GPU


def test_blocks_are_spread_and_share_a_multiprocessor():
    alone = blocks.PROLOGUE + blocks.EPILOGUE

    def found(count, resident=1):
        seconds = blocks.seconds(count * [8192.0], resident, {1: 1000.0, 2: 600.0})
        return seconds * blocks.HERTZ - alone

    # A quarter has 2048 scores of a block.
    assert found(1) == pytest.approx(2000)
    assert found(blocks.MULTIPROCESSORS) == pytest.approx(2000)
    assert found(blocks.MULTIPROCESSORS + 1) == pytest.approx(2000 + 2000 + blocks.PROLOGUE)
    # Two at once: each gets its turn.
    assert found(blocks.MULTIPROCESSORS + 1, resident=2) == pytest.approx(2 * 2 * 600)
    assert blocks.seconds([0.0, 0.0], 1, {1: 1000.0}) == 0


def test_clocks_between_those_that_were_simulated():
    known = {1: 1000.0, 2: 600.0, 5: 300.0}
    assert [blocks.clocks_at(known, count) for count in (1, 3, 5, 9)] == [1000, 500, 300, 300]


KERNEL = figures.Figures(
    name="some_kernel",
    form="64 × 64, 4 warps",
    architecture=90,
    registers=96,
    stack=0,
    shared=36864,
    warps=4,
    tile=(64, 64),
    blocks=5,
    instructions=495.0,
    by_name={"FADD": 68.0, "HGMMA": 8.0},
    exponentials=1.06,
    local=0.0,
    overlap=0.8,
    needs={"issue": 495.0, "fma": 174.0, "alu": 368.0, "xu": 296.0, "tensor": 192.0, "shared": 416.0},
    clocks={"1": 1838.0, "2": 1048.0, "5": 607.0},
    tail_clocks={},
)


def test_a_good_kernel_needs_no_remark():
    assert remarks.of(KERNEL) == []
    assert (KERNEL.binding, KERNEL.alone, KERNEL.full) == ("issue", 1838.0, 607.0)
    assert KERNEL.ratio == pytest.approx(607 / 256)
    assert replace(KERNEL, exponentials=0.0).ratio is None


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({"exponentials": 2.0}, "computes exponentials 2.0 times"),
        ({"by_name": {"HMMA": 48.0, "HGMMA": 12.0}}, "HMMA for HGMMA (48 beside 12)"),
        ({"by_name": {"HMMA": 48.0}}, "HMMA for HGMMA"),
        ({"overlap": 0.01}, "waits for all copies 1% of a trip after the last"),
        ({"stack": 48, "local": 12.0}, "spills: 48 bytes of stack, 12 instructions"),
        ({"blocks": 0}, "not one block fits a multiprocessor"),
    ],
)
def test_what_is_bad_is_told(change, remark):
    assert remarks.of(replace(KERNEL, **change)) == [remark]


def test_other_architectures_have_no_hgmma_to_be_without():
    assert remarks.of(replace(KERNEL, architecture=80, by_name={"HMMA": 48.0})) == []


def test_what_takes_longer_than_before_is_told():
    slower = replace(KERNEL, clocks={"1": 1838.0, "5": 607.0 * 1.06})
    more = replace(KERNEL, architecture=80, clocks={}, instructions=495 * 1.04)
    found, before = {"a": slower, "b": more, "new": KERNEL}, {"a": KERNEL, "b": replace(KERNEL, clocks={})}
    assert remarks.longer(found, before) == {"a": pytest.approx(1.06)}


def test_copies_that_are_waited_for_at_once():
    """As Triton's loops with two stages have them: issued at the end of a trip, waited for at the top of the next."""
    loop = ["DEPBAR.LE SB0, 0x0", PRODUCT, POWER, "LDGSTS.E.128 [R1], [R2.64]", "LDGDEPBAR", "@P0 BRA 0x0", "EXIT"]
    late, early, deep = (hot_path.find(function(*lines), Hints(exponentials=1)) for lines in (
        loop,
        [loop[0], *loop[3:5], *loop[1:3], *loop[5:]],
        ["DEPBAR.LE SB0, 0x1", *loop[1:]],
    ))  # fmt: skip
    assert figures.overlap(late) == 3 / 6
    assert figures.overlap(early) == 5 / 6
    assert figures.overlap(deep) is None


PROBLEM = Problem("r50", 2, torch.bfloat16, 0.1, True, True)
"""Valid are 25 × 34 and 25 × 19 cells: 13.3 and 7.4 tiles of 64 keys."""


def scores(grid, walk, **changes):
    """Tiles of each block of one head, for both images."""
    launch = Launch("some_kernel", grid, (128, 1, 1), 0)
    found = problems.block_scores(launch, replace(KERNEL, **changes), walk, PROBLEM)
    assert len(found) == grid[0] * grid[1] * grid[2]
    tiles = [one / 4096 for one in found]
    return [tiles[first : first + grid[0]] for first in (0, grid[0] * 8)]


def test_blocks_of_queries_walk_over_what_is_valid():
    walk = problems.Walk("keys")
    assert scores((5, 8, 2), walk) == [5 * [14], 5 * [8]]
    assert scores((5, 8, 2), replace(walk, with_padding=True)) == [5 * [14], 5 * [14]]
    # The tile at the edge in a loop of its own, which takes half as long again.
    tail = {str(KERNEL.blocks): 1.5 * KERNEL.full}
    assert scores((5, 8, 2), walk, tail_clocks=tail) == [5 * [13 + 1.5], 5 * [7 + 1.5]]
    with pytest.raises(figures.UnknownKernelError, match=r"some_kernel: grid \(5, 4, 2\), expected \(·, 8, 2\)"):
        scores((5, 4, 2), walk)


def test_blocks_of_keys_walk_over_all_queries():
    walk = problems.Walk("queries")
    # 300 queries are five tiles; blocks behind the valid keys have nothing to do.
    assert scores((14, 8, 2), walk) == [14 * [5], 8 * [5] + 6 * [0]]
    # So few blocks that each has several tiles of keys.
    assert scores((4, 8, 2), walk) == [[20, 20, 15, 15], [10, 10, 10, 10]]


def test_blocks_share_the_bits_of_dropout():
    launch = Launch("some_kernel", (100, 1, 1), (256, 1, 1), 0)
    found = problems.block_scores(launch, KERNEL, problems.Walk("bits"), PROBLEM)
    assert found == 100 * [2 * 8 * 300 * 14 * 64 / 100]


def test_the_floor_is_the_largest_of_three():
    one = replace(PROBLEM, padded=False, backward=False)
    exponentials = 2 * 8 * 300 * 25 * 34 / (132 * 16 * 1.755e9)
    assert problems.floor(one) == pytest.approx(exponentials)
    # With gradients all is read or written three times in all, and that takes longer.
    both = 3 * (2 * 300 + 2 * 850 + 25 + 34 + 300) * 2 * 256 * 2
    assert problems.floor(replace(one, backward=True)) == pytest.approx(both / counting.BANDWIDTH)


def test_a_kernel_that_nothing_is_known_of_is_an_error():
    with pytest.raises(figures.UnknownKernelError, match="attn new_kernel: LAUNCHES in gpu_model/cuda_code"):
        cuda_code.kernel("_ZN8conddetr4attn10new_kernelI13__nv_bfloat16Lb1EEEvv", b"", 90, True)


def test_a_file_is_read_as_it_was_written(tmp_path):
    part = stored.Part("some_kernel", 1.234e-5)
    problem = stored.Prediction("triton", "r50", 8, True, False, 2e-5, 1e-5, 1, (part,))
    row = stored.Row("triton", "32 channels", KERNEL)
    written = stored.Predictions("abc", {"triton": "3.9.0"}, (row,), (KERNEL,), (problem,))
    stored.write(tmp_path / "some" / "where.json", written)
    assert stored.read(tmp_path / "some" / "where.json") == written
    assert stored.read(tmp_path / "nowhere.json") == stored.Predictions()
    assert "Nothing is measured" in json.loads((tmp_path / "some" / "where.json").read_text())["note"]


def predicted_now(out, *options):
    """What the program finds in another process; kernels defined under the interpreter cannot be compiled."""
    if aot_cuda.find_nvcc() is None:
        pytest.skip("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    # The peers are those of the file.
    stored.write(out, replace(stored.Predictions(), peers=COMMITTED.peers))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/run.py", "predict", *options, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    return stored.read(out)


def hold(found, worse):
    """Nothing may be worse than the committed file says, for the same compilers; others are reported."""
    compilers = [{name: one.versions[name] for name in ("triton", "nvcc")} for one in (found, COMMITTED)]
    if compilers[0] != compilers[1]:
        pytest.skip(f"{compilers[0]} where the committed file has {compilers[1]}; longer: {worse}")
    assert not worse


def test_kernels_of_training_are_no_slower_than_the_committed_file_says(tmp_path):
    """A change that makes them faster writes the file anew: make predict."""
    found = predicted_now(tmp_path / "found.json", "--architectures", "90", "--main", "--no-problems")
    before = COMMITTED.figures()
    assert found.figures()
    assert found.figures().keys() <= before.keys()
    hold(found, remarks.longer(found.figures(), before))


@pytest.mark.slow
def test_the_committed_file_is_what_the_program_writes(tmp_path):
    found = predicted_now(tmp_path / "found.json")
    assert found.figures().keys() == COMMITTED.figures().keys()
    before = {problem.key: problem.seconds for problem in COMMITTED.problems}
    now = {problem.key: problem.seconds for problem in found.problems}
    assert now.keys() == before.keys()
    slower = {key: now[key] / before[key] for key in now if now[key] >= remarks.LONGER * before[key]}
    hold(found, {**remarks.longer(found.figures(), COMMITTED.figures()), **slower})


def test_every_figure_of_the_committed_file_is_told_as_predicted():
    assert COMMITTED.versions.keys() == {"triton", "nvcc", "torch", "torch of the peers"}
    assert {row.implementation for row in COMMITTED.kernels} == {"triton", "native"}
    assert {row.figures.architecture for row in COMMITTED.kernels} == {80, 86, 89, 90, 100, 120}
    assert COMMITTED.peers
    for row in COMMITTED.kernels:
        assert bool(row.figures.clocks) == (row.figures.architecture == figures.TIMED), asdict(row)["figures"]
    # No prediction is below what nobody can beat.
    assert all(problem.seconds > problem.floor for problem in COMMITTED.problems)


def test_candidates_are_what_ships_and_the_fastest_of_each_shape(monkeypatch, tmp_path):
    one = ranking.lists()["other, backward_key, tf32"]
    shipped = launch_settings(80, "tf32", 32).backward_key
    fastest, twin, near, far = Tiles(64, 16, 4, 3), Tiles(64, 16, 4, 1), Tiles(32, 32, 4, 1), Tiles(64, 32, 4, 1)
    spilled, too_large = Tiles(64, 64, 4, 1), Tiles(128, 64, 8, 1)
    predicted = {fastest: 3.0, twin: 4.0, near: 4.3, shipped: 7.0, far: 9.0, spilled: None, too_large: 2.9}
    monkeypatch.setattr(ranking, "clocks", lambda one, tiles: predicted.get(tiles, 100.0))
    monkeypatch.setattr(ranking, "fits", lambda one, tiles, architectures: tiles != too_large)
    key, found = ranking.rank(one)
    assert found == [(tiles, predicted[tiles]) for tiles in (fastest, twin, near, shipped)]
    ranking.write({key: found}, tmp_path / "candidates.json")
    written = json.loads((tmp_path / "candidates.json").read_text())["settings"][key]
    assert [read_tiles("backward_key", stored) for stored in written] == [fastest, twin, near, shipped]
    predicted[near] = 4.4
    monkeypatch.setattr(ranking, "COUNT", 3)
    assert [tiles for tiles, _ in ranking.rank(one)[1]] == [fastest, twin, shipped], "another shape is too slow"


@pytest.mark.slow
def test_candidates_spill_nothing():
    """On Hopper; of the others on one with the least shared memory, for which all of them were tried."""
    program = (
        "from conddetr.kernels.attn.triton.launch import candidates\n"
        "from gpu_model import figures, ranking\n"
        "for one in ranking.lists().values():\n"
        "    on = figures.TIMED if one.architecture == figures.TIMED else ranking.SMALLEST\n"
        "    for tiles in candidates(on, one.kernel, one.form):\n"
        "        assert ranking.fits(one, tiles, (on,)), (one.key, tiles)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "benchmarks")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
