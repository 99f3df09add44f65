"""Predictions from machine code: each part against results computed by hand, and the committed file."""

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
    """Machine code that Triton's assembler generates for a loop of exponentials."""
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
    # Its latency varies: the instruction that adds the result waits for its scoreboard.
    [added] = [i for i in function.code if i.name == "FADD" and power.control.sets in i.control.waits]
    assert added.address > power.address
    assert all(0 <= i.control.stall <= 15 for i in function.code)
    usage = machine_code.resources(assembled)[name]
    assert 0 < usage["REG"] <= 16
    assert usage["STACK"] == 0


def test_loop_is_found_and_followed(assembled):
    function = machine_code.read(assembled, "powers_kernel")["powers_kernel"]
    path = hot_path.find(function, Hints(exponentials=1))
    assert path.is_loop
    assert [i.operation for i in path.main if i.name in ("MUFU", "STG")] == ["MUFU.EX2"]
    assert path.main[-1].name == "BRA"
    assert path.main[-1].target == path.main[0].address
    with pytest.raises(HotPathError, match=r"expected 32 exponentials in a trip of the loop at 0x.*, got 1\."):
        hot_path.find(function, Hints(exponentials=32))


def test_invalid_machine_code_is_an_error():
    with pytest.raises(RuntimeError, match="cannot read the machine code"):
        machine_code.read(b"nothing")


def function(*lines):
    """A function of instructions such as `@P0 BRA 0x30`, 16 bytes each, without control codes."""
    code = "\n".join(f"  /*{16 * i:04x}*/ {line} ; /* 0x{0:016x} */\n /* 0x{0:016x} */" for i, line in enumerate(lines))
    [parsed] = machine_code.parse(f"\tFunction : some_kernel\n{code}\n").values()
    return parsed


def names(path):
    return [instruction.name for instruction in path]


PRODUCT = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
POWER = "MUFU.EX2 R4, R4"


def test_hot_path_has_copies_and_no_masks():
    kernel = function(
        "MOV R1, R2",
        "@P0 BRA 0x30",  # start of the loop; after the last tile nothing is copied
        "LDGSTS.E.128 [R1], [R2.64]",
        PRODUCT,
        "@!P1 BRA 0x70",  # only at the edge
        "FSEL R4, R4, R5, P2",
        "FSEL R4, R4, R5, P3",
        POWER,
        "@P4 BRA 0x10",
        "EXIT",
    )
    path = hot_path.find(kernel, Hints(exponentials=1))
    assert names(path.main) == ["BRA", "LDGSTS", "HMMA", "BRA", "MUFU", "BRA"]
    assert path.tail == []
    without = hot_path.find(kernel, Hints(exponentials=1, avoids=("LDGSTS",)))
    assert names(without.main) == ["BRA", "HMMA", "BRA", "MUFU", "BRA"]


def test_code_for_diverged_lanes_after_the_loop_is_no_loop():
    kernel = function(
        PRODUCT,
        "BRA.DIV UR4, 0x50",
        POWER,
        "@P0 BRA 0x0",
        "EXIT",
        "SHFL.BFLY PT, R4, R4, 0x1, 0x1f",
        "BRA 0x20",
        "BRA 0x70",
    )
    [loop] = Flow(kernel).loops
    assert loop.body == {0, 1}
    assert names(hot_path.find(kernel, Hints(exponentials=1)).main) == ["HMMA", "BRA", "MUFU", "BRA"]


def test_second_loop_of_the_same_kind_is_the_tail():
    lines = [PRODUCT, POWER, "@P0 BRA 0x0", PRODUCT, "FSEL R4, R4, R5, P2", POWER, "@P0 BRA 0x30", "EXIT"]
    path = hot_path.find(function(*lines), Hints(exponentials=1))
    assert names(path.main) == ["HMMA", "MUFU", "BRA"]
    assert names(path.tail) == ["HMMA", "FSEL", "MUFU", "BRA"]
    three = [*lines[:-1], PRODUCT, POWER, "@P0 BRA 0x70", "EXIT"]
    with pytest.raises(HotPathError, match="got main loops at 0x0, 0x30, 0x70"):
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


def test_inner_loops_repeat_until_there_are_enough_exponentials():
    path = hot_path.find(function(*NESTED), Hints(exponentials=3))
    assert names(path.main) == ["IADD3", *3 * ["HMMA", "MUFU", "BRA"], "LDS", "BRA", "BRA"]
    by_hint = hot_path.find(function(*NESTED), Hints(exponentials=3, trips=(3, 2)))
    assert names(by_hint.main) == ["IADD3", *3 * ["HMMA", "MUFU", "BRA"], *2 * ["LDS", "BRA"], "BRA"]
    with pytest.raises(HotPathError, match="expected 1 inner loops, got 0x10, 0x40"):
        hot_path.find(function(*NESTED), Hints(trips=(3,)))
    inner = hot_path.find(function(*NESTED), Hints(exponentials=1, depth=1))
    assert names(inner.main) == ["HMMA", "MUFU", "BRA"]


def test_loop_with_an_exit_in_its_middle_repeats_as_often():
    """The exit is a call that does not return, as in nvcc's code for sm_80."""
    lines = ["IADD3 R1, R1, R2, RZ", PRODUCT, POWER, "@P0 CALL.REL.NOINC 0x50", "BRA 0x10", "@P2 BRA 0x0", "EXIT"]
    path = hot_path.find(function(*lines), Hints(exponentials=2))
    once = ["HMMA", "MUFU", "CALL"]
    assert names(path.main) == ["IADD3", *once, "BRA", *once, "BRA"]


def test_products_in_an_inner_loop_need_known_trips():
    lines = ["MOV R1, R2", PRODUCT, "@P0 BRA 0x10", POWER, "@P1 BRA 0x0", "EXIT"]
    with pytest.raises(HotPathError, match="the trips of the loop of products at 0x10 are unknown"):
        hot_path.find(function(*lines), Hints(exponentials=1))


def test_path_without_a_loop_is_the_whole_kernel():
    path = hot_path.find(function("LOP3.LUT R1, R2, R3, RZ", "STG.E [R4], R1", "EXIT", "BRA 0x30"), Hints())
    assert not path.is_loop
    assert names(path.main) == ["LOP3", "STG", "EXIT"]


def path(*lines):
    """Instructions such as `FADD R1, R2 | stall 2, sets 0, reads 1, waits 0 3`; the default stall is one clock."""
    instructions = []
    for line, text in zip(function(*(line.split(" | ")[0] for line in lines)).code, lines, strict=True):
        codes = {"stall": ["1"], "sets": [None], "reads": [None], "waits": []}
        for word in text.split(" | ")[1].split(", ") if " | " in text else ():
            name, *values = word.split()
            codes[name] = values
        stall, sets, reads = (None if codes[name][0] is None else int(codes[name][0]) for name in list(codes)[:3])
        control = machine_code.Control(stall, sets, reads, tuple(map(int, codes["waits"])))
        instructions.append(replace(line, control=control))
    return instructions


def clocks(lines, warps=4, on=1):
    """Simulated clocks of one warp's trip."""
    return partition.simulate(path(*lines), warps, on, stagger=0.0)


ADD, LOGIC = "FADD R1, R2, R3", "LOP3.LUT R1, R2, R3, RZ"


def test_clocks_of_units():
    # Two halves with two clocks each; one half alone; the queue of the special-function unit fills once.
    assert clocks(8 * [ADD]) == 8
    assert clocks(8 * [LOGIC]) == 16
    assert clocks([LOGIC, ADD]) == 2
    assert clocks(["MUFU.EX2 R1, R1"], on=4) == pytest.approx(8, abs=0.5)
    assert clocks([PRODUCT], on=4) == pytest.approx(pipes.HMMA)
    # An instruction with a false predicate only takes an issue slot.
    assert clocks(["@!PT LOP3.LUT R1, R2, R3, RZ"], on=4) == 1


def test_stalls_and_scoreboards_make_a_warp_wait():
    assert clocks([f"{ADD} | stall 5"]) == 5
    # Other warps run in the meantime.
    assert clocks([f"{ADD} | stall 5"], on=4) == pytest.approx(5 / 4)
    loaded = ["LDS R1, [R2] | stall 2, sets 0", f"{ADD} | waits 0"]
    # Latency of the load, a clock for its one pass, and one of the add.
    assert clocks(loaded) == pipes.LATENCY["LDS"] + 1 + 1
    assert clocks(loaded, on=5) == pytest.approx((pipes.LATENCY["LDS"] + 2) / 5)
    # Without a wait only the stalls count.
    assert clocks([loaded[0], ADD]) == 2 + 1


def test_shared_memory_is_shared_by_four_quarters():
    # 512 bytes of each quarter in turn; no other unit takes as long.
    assert clocks(["LDS.128 R4, [R2] | sets 0", f"{ADD} | waits 0"], on=8) == pytest.approx(16)
    assert pipes.needs(path("LDS.128 R4, [R2]", "LDSM.16.M88.4 R4, [R2]", "SHFL.BFLY PT, R1, R1, 0x1, 0x1f")) == {
        "issue": 3, "fma": 0, "alu": 0, "xu": 0, "tensor": 0, "shared": 4 * (4 + 4 + 1),
    }  # fmt: skip


def test_needs_of_products_and_of_integers():
    group = "HGMMA.64x32x16.F32.BF16 R56, R88, gdesc[UR4].tnspB, R56, gsb0"
    both = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT"
    needs = pipes.needs(path(group, both, "IMAD R1, R2, R3, R4", "FFMA R1, R2, R3, R4", "FFMA R1, R2, R3, R4"))
    # 64 × 32 × 16 products at 512 per clock and quarter; a tile of 16-bit numbers at 128 bytes per clock.
    assert needs["tensor"] == 16 + 32
    assert needs["shared"] == 32 * 16 * 2 / 128 + (64 + 64) * 16 * 2 / 128
    assert needs["fma"] == 3
    assert pipes.needs(path("HMMA.1688.F32.BF16 R4, R8, R12, R4"))["tensor"] == pipes.HMMA / 2
    assert pipes.needs(path("HMMA.1688.F32.TF32 R4, R8, R12, R4"))["tensor"] == pipes.HMMA


def test_waits_for_groups_of_copies_and_products():
    def trip(pending):
        return ["LDGSTS.E.128 [R1], [R2.64]", "LDGDEPBAR", f"DEPBAR.LE SB0, 0x{pending}", f"{ADD} | stall 15"]

    alone = clocks(trip(0))
    assert alone == pipes.LATENCY["LDGSTS"] + 1 + 15
    # With two in flight a trip waits for the copy of two trips before: a third of the time remains.
    assert clocks(trip(2)) == pytest.approx(alone / 3, rel=0.15)
    # The same holds for products of warpgroups.
    product = ["HGMMA.64x64x16.F32.BF16 R24, R72, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    assert clocks(product) == 32 + pipes.LATENCY["HGMMA"] + 1


def test_barrier_opens_after_the_last_warp():
    lines = ["BAR.SYNC.DEFER_BLOCKING 0x0", f"{ADD} | stall 3"]
    assert clocks(lines) == pipes.BARRIER + 3
    # Two warps of a block arrive one after the other.
    assert 2 * clocks(lines, warps=8) == pytest.approx(pipes.BARRIER + 4, abs=1)
    assert 2 * clocks(lines, on=2) == pytest.approx(pipes.BARRIER + 3, abs=1)


def test_fence_for_the_gpu_takes_longer():
    assert clocks(["MEMBAR.ALL.CTA"]) == pipes.FENCE
    assert clocks(["MEMBAR.SC.GPU"]) == pipes.FENCE_OF_GPU


def test_blocks_are_distributed_and_share_a_multiprocessor():
    alone = blocks.PROLOGUE + blocks.EPILOGUE

    def clocks_of(count, resident=1):
        seconds = blocks.seconds(count * [8192.0], resident, {1: 1000.0, 2: 600.0})
        return seconds * blocks.HERTZ - alone

    # A quarter has 2048 scores of a block.
    assert clocks_of(1) == pytest.approx(2000)
    assert clocks_of(blocks.MULTIPROCESSORS) == pytest.approx(2000)
    assert clocks_of(blocks.MULTIPROCESSORS + 1) == pytest.approx(2000 + 2000 + blocks.PROLOGUE)
    # Two resident blocks share the multiprocessor.
    assert clocks_of(blocks.MULTIPROCESSORS + 1, resident=2) == pytest.approx(2 * 2 * 600)
    assert blocks.seconds([0.0, 0.0], 1, {1: 1000.0}) == 0


def test_clocks_are_interpolated():
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


def test_good_kernel_has_no_remarks():
    assert remarks.of(KERNEL) == []
    assert (KERNEL.binding, KERNEL.alone, KERNEL.full) == ("issue", 1838.0, 607.0)
    assert KERNEL.ratio == pytest.approx(607 / 256)
    assert replace(KERNEL, exponentials=0.0).ratio is None


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({"exponentials": 2.0}, "computes exponentials 2.0 times"),
        ({"by_name": {"HMMA": 48.0, "HGMMA": 12.0}}, "HMMA instead of HGMMA (48 beside 12)"),
        ({"by_name": {"HMMA": 48.0}}, "HMMA instead of HGMMA"),
        ({"overlap": 0.01}, "waits for all copies 1% of a trip after the last"),
        ({"stack": 48, "local": 12.0}, "spills: 48 bytes of stack, 12 instructions"),
        ({"blocks": 0}, "not one block fits a multiprocessor"),
    ],
)
def test_defect_has_a_remark(change, remark):
    assert remarks.of(replace(KERNEL, **change)) == [remark]


def test_no_remark_on_hmma_for_other_architectures():
    assert remarks.of(replace(KERNEL, architecture=80, by_name={"HMMA": 48.0})) == []


def test_slower_kernels_are_reported():
    slower = replace(KERNEL, clocks={"1": 1838.0, "5": 607.0 * 1.06})
    more = replace(KERNEL, architecture=80, clocks={}, instructions=495 * 1.04)
    now, before = {"a": slower, "b": more, "new": KERNEL}, {"a": KERNEL, "b": replace(KERNEL, clocks={})}
    assert remarks.longer(now, before) == {"a": pytest.approx(1.06)}


def test_overlap_of_copies():
    """Triton's loops with two stages issue copies at the end of a trip and wait for them at the top of the next."""
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
"""Its valid cells are 25 × 34 and 25 × 19: 13.3 and 7.4 tiles of 64 keys."""


def scores(grid, walk, **changes):
    """Tiles of each block of block head, for both images."""
    launch = Launch("some_kernel", grid, (128, 1, 1), 0)
    work = problems.block_scores(launch, replace(KERNEL, **changes), walk, PROBLEM)
    assert len(work) == grid[0] * grid[1] * grid[2]
    tiles = [block / 4096 for block in work]
    return [tiles[first : first + grid[0]] for first in (0, grid[0] * 8)]


def test_blocks_of_queries_visit_valid_keys():
    walk = problems.Walk("keys")
    assert scores((5, 8, 2), walk) == [5 * [14], 5 * [8]]
    assert scores((5, 8, 2), replace(walk, with_padding=True)) == [5 * [14], 5 * [14]]
    # A separate loop for the tile at the edge takes 1.5 times as long.
    tail = {str(KERNEL.blocks): 1.5 * KERNEL.full}
    assert scores((5, 8, 2), walk, tail_clocks=tail) == [5 * [13 + 1.5], 5 * [7 + 1.5]]
    with pytest.raises(figures.UnknownKernelError, match=r"some_kernel: grid \(5, 4, 2\), expected \(·, 8, 2\)"):
        scores((5, 4, 2), walk)


def test_blocks_of_keys_visit_all_queries():
    walk = problems.Walk("queries")
    # 300 queries are five tiles; blocks past the valid keys have no work.
    assert scores((14, 8, 2), walk) == [14 * [5], 8 * [5] + 6 * [0]]
    # With few blocks, each has several tiles of keys.
    assert scores((4, 8, 2), walk) == [[20, 20, 15, 15], [10, 10, 10, 10]]


def test_blocks_share_the_bits_of_dropout():
    launch = Launch("some_kernel", (100, 1, 1), (256, 1, 1), 0)
    work = problems.block_scores(launch, KERNEL, problems.Walk("bits"), PROBLEM)
    assert work == 100 * [2 * 8 * 300 * 14 * 64 / 100]


def test_floor_is_the_largest_of_three():
    forward = replace(PROBLEM, padded=False, backward=False)
    exponentials = 2 * 8 * 300 * 25 * 34 / (132 * 16 * 1.755e9)
    assert problems.floor(forward) == pytest.approx(exponentials)
    # With gradients everything is read or written three times in all, and bytes decide.
    both = 3 * (2 * 300 + 2 * 850 + 25 + 34 + 300) * 2 * 256 * 2
    assert problems.floor(replace(forward, backward=True)) == pytest.approx(both / counting.BANDWIDTH)


def test_unknown_kernel_is_an_error():
    with pytest.raises(figures.UnknownKernelError, match="attn new_kernel: LAUNCHES in gpu_model/cuda_code"):
        cuda_code.kernel("_ZN8conddetr4attn10new_kernelI13__nv_bfloat16Lb1EEEvv", b"", 90, True)


def test_file_round_trip(tmp_path):
    part = stored.Part("some_kernel", 1.234e-5)
    problem = stored.Prediction("triton", "r50", 8, True, False, 2e-5, 1e-5, 1, (part,))
    row = stored.Row("triton", "32 channels", KERNEL)
    written = stored.Predictions("abc", {"triton": "3.9.0"}, (row,), (KERNEL,), (problem,))
    stored.write(tmp_path / "some" / "where.json", written)
    assert stored.read(tmp_path / "some" / "where.json") == written
    assert stored.read(tmp_path / "nowhere.json") == stored.Predictions()
    assert "Nothing is measured" in json.loads((tmp_path / "some" / "where.json").read_text())["note"]


def predicted_now(out, *options):
    """Predictions of another process: kernels that are defined under the interpreter cannot be compiled."""
    if aot_cuda.find_nvcc() is None:
        pytest.skip("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    # The peers are taken from the committed file.
    stored.write(out, replace(stored.Predictions(), peers=COMMITTED.peers))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/run.py", "predict", *options, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    return stored.read(out)


def assert_no_slower(predictions, worse):
    """Nothing may be slower than in the committed file with the same compilers; with others it is only reported."""
    compilers = [{name: entry.versions[name] for name in ("triton", "nvcc")} for entry in (predictions, COMMITTED)]
    if compilers[0] != compilers[1]:
        pytest.skip(f"{compilers[0]} but the committed file has {compilers[1]}; slower: {worse}")
    assert not worse


def test_kernels_of_training_are_no_slower_than_in_the_committed_file(tmp_path):
    """After a change that makes them faster, rewrite the file: make predict."""
    predictions = predicted_now(tmp_path / "predictions.json", "--architectures", "90", "--main", "--no-problems")
    before = COMMITTED.figures()
    assert predictions.figures()
    assert predictions.figures().keys() <= before.keys()
    assert_no_slower(predictions, remarks.longer(predictions.figures(), before))


@pytest.mark.slow
def test_committed_file_matches_the_program(tmp_path):
    predictions = predicted_now(tmp_path / "predictions.json")
    assert predictions.figures().keys() == COMMITTED.figures().keys()
    before = {problem.key: problem.seconds for problem in COMMITTED.problems}
    now = {problem.key: problem.seconds for problem in predictions.problems}
    assert now.keys() == before.keys()
    slower = {key: now[key] / before[key] for key in now if now[key] >= remarks.LONGER * before[key]}
    assert_no_slower(predictions, {**remarks.longer(predictions.figures(), COMMITTED.figures()), **slower})


def test_contents_of_the_committed_file():
    assert COMMITTED.versions.keys() == {"triton", "nvcc", "torch", "torch of the peers"}
    assert {row.implementation for row in COMMITTED.kernels} == {"triton", "native"}
    assert {row.figures.architecture for row in COMMITTED.kernels} == {80, 86, 89, 90, 100, 120}
    assert COMMITTED.peers
    for row in COMMITTED.kernels:
        assert bool(row.figures.clocks) == (row.figures.architecture == figures.TIMED), asdict(row)["figures"]
    # No prediction is below its floor.
    assert all(problem.seconds > problem.floor for problem in COMMITTED.problems)


def test_candidates_are_the_shipped_settings_and_the_fastest_of_each_shape(monkeypatch, tmp_path):
    one = ranking.lists()["other, backward_key, tf32"]
    shipped = launch_settings(80, "tf32", 32).backward_key
    fastest, twin, near, far = Tiles(64, 16, 4, 3), Tiles(64, 16, 4, 1), Tiles(32, 32, 4, 1), Tiles(64, 32, 4, 1)
    spilled, too_large = Tiles(64, 64, 4, 1), Tiles(128, 64, 8, 1)
    predicted = {fastest: 3.0, twin: 4.0, near: 4.3, shipped: 7.0, far: 9.0, spilled: None, too_large: 2.9}
    monkeypatch.setattr(ranking, "clocks", lambda one, tiles: predicted.get(tiles, 100.0))
    monkeypatch.setattr(ranking, "fits", lambda one, tiles, architectures: tiles != too_large)
    key, ranked = ranking.rank(one)
    assert ranked == [(tiles, predicted[tiles]) for tiles in (fastest, twin, near, shipped)]
    ranking.write({key: ranked}, tmp_path / "candidates.json")
    written = json.loads((tmp_path / "candidates.json").read_text())["settings"][key]
    assert [read_tiles("backward_key", stored) for stored in written] == [fastest, twin, near, shipped]
    predicted[near] = 4.4
    monkeypatch.setattr(ranking, "COUNT", 3)
    assert [tiles for tiles, _ in ranking.rank(one)[1]] == [fastest, twin, shipped], "another shape is too slow"


@pytest.mark.slow
def test_candidates_spill_nothing():
    """On Hopper, and on the other architecture with the least shared memory."""
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
