"""What bounds a step: the counts that need no compiler, and the page that states them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparseprefill.kernels.roofline import ACCELERATORS, Step, bound, idle_share, programs_that_fit

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
NAMED = {each.name: each for each in ACCELERATORS}


def test_counts_of_a_step() -> None:
    step = Step(rows=128, keys=64, head_dim=128, value_dim=128)
    assert step.flops == 4 * 128 * 64 * 128
    assert step.loaded == 2 * 64 * 128 * 2
    assert step.exponentials == 128 * 64 + 128
    assert step.intensity == 128  # each key meets every row: 4 FLOPs a number of 2 bytes twice
    assert Step(64, 64, 128, 128).intensity == 64
    assert Step(128, 64, 64, 128).flops == 2 * 128 * 64 * 192


def test_bounds_of_a_step() -> None:
    found = bound(Step(128, 64, 128, 128), NAMED["H100 SXM"], instructions=345, warps=8)
    assert found.tensor == 1024
    assert found.exponential == 520
    assert found.issue == 690
    assert found.resource == "tensor cores"
    assert found.overlapped == 1
    assert found.in_turn == pytest.approx(1024 / 1714)
    # bytes of memory a clock and multiprocessor: 3.35 TB/s over 989 TFLOP/s in FLOPs of 4096 a clock
    assert found.memory == pytest.approx(32768 / (3.35e12 / (989e12 / 4096)))
    # half as many instructions as clocks would leave the exponentials to wait for
    assert bound(Step(128, 64, 64, 64), NAMED["B200"], 200, 8).resource == "exponentials"
    assert bound(Step(128, 64, 64, 64), NAMED["B200"], 400, 8).resource == "instructions"


def test_the_same_from_the_ridge() -> None:
    """Reuse in L2 is how far the intensity lies below the ridge, where products bound the step."""
    for accelerator in ACCELERATORS:
        step = Step(128, 64, 128, 128)
        found = bound(step, accelerator, 1, 1)
        if found.resource == "tensor cores":
            assert found.reuse == pytest.approx(accelerator.ridge / step.intensity)


def test_how_many_programs_fit() -> None:
    assert programs_that_fit(90, 128, 8, 66 << 10) == 2  # registers
    assert programs_that_fit(90, 129, 8, 66 << 10) == 1  # go by eight
    assert programs_that_fit(90, 32, 4, 113 << 10) == 2  # shared memory, 1 KiB of it taken by each
    assert programs_that_fit(90, 32, 4, 114 << 10) == 1
    assert programs_that_fit(80, 16, 32, 1 << 10) == 2  # warps


def test_how_much_of_a_gpu_idles() -> None:
    """The counts on the page: rows of 128 queries, blocks of 64 keys, 32k tokens, 32 heads, 132 multiprocessors."""
    assert idle_share([4, 2, 2], 2) == 0
    assert idle_share([6, 1, 1], 2) == pytest.approx(1 / 3)
    assert idle_share([2, 3, 2, 3, 2], 2) == pytest.approx(1 - 12 / 14)  # the order is longest first, not the best
    full = [2 * row for row in range(1, 257)]
    window = [min(64, count) for count in full]
    lists = {
        "dense": full, "a_shape": window, "tri_shape": [*window[:-1], full[-1]], "5 %": [max(1, c // 20) for c in full],
        "one full row": [1] * 255 + full[-1:],
    }  # fmt: skip
    idle = {name: idle_share(counts * 32, 132) for name, counts in lists.items()}
    assert max(idle[name] for name in ("dense", "a_shape", "tri_shape", "5 %")) < 0.0015
    assert f"{idle['one full row']:.0%}" == "64%"
    assert f"{idle_share(full, 132):.0%}" == "3%"
    assert all(0.025 < idle_share(full[-rows:] * 32, 132) < 0.045 for rows in (4, 16))
    assert f"{idle_share(full[-1:] * 32, 132):.0%}" == "76%"


def rows(title: str) -> list[dict[str, str]]:
    """The table on the page whose first column has this title."""
    section = PAGE.read_text().split("## The Triton kernel, by count")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    begin = next(place for place, cells in enumerate(lines) if cells[0] == title)
    table = []
    for cells in lines[begin + 2 :]:
        if len(cells) != len(lines[begin]):
            break
        table.append(dict(zip(lines[begin], cells, strict=True)))
    return table


def test_the_page_adds_up() -> None:
    """Each number that follows from the tile, the registers and the instructions there is what they give."""
    made = {(row["capability"], row["head_dim"]): row for row in rows("capability")}
    assert set(made) == {(capability, dim) for capability in ("8.0", "9.0", "10.0") for dim in ("64", "128")}
    seen = set()
    for row in rows("GPU"):
        accelerator = NAMED[row["GPU"]]
        kernel = made[f"{accelerator.architecture / 10:.1f}", row["head_dim"]]
        queries, keys = map(int, kernel["tile"].split(" x "))
        step = Step(queries, keys, int(row["head_dim"]), int(row["head_dim"]))
        assert kernel["FLOP / byte"] == f"{step.intensity:.0f}"
        assert kernel["KiB loaded"] == f"{step.loaded / 1024:.0f}"
        assert kernel["FLOP / exp"] == f"{step.flops / step.exponentials:.0f}"
        fit = programs_that_fit(
            accelerator.architecture, int(kernel["registers"]), int(kernel["warps"]), int(kernel["shared KiB"]) << 10
        )
        assert kernel["programs"] == str(fit)
        found = bound(step, accelerator, int(kernel["instructions"]), int(kernel["warps"]))
        assert row["tensor cores"] == f"{found.tensor:.0f}"
        assert row["exponentials"] == f"{found.exponential:.0f}"
        assert row["instructions"] == f"{found.issue:.0f}"
        assert row["bound by"] == found.resource
        assert (row["overlapped"], row["in turn"]) == (f"{found.overlapped:.0%}", f"{found.in_turn:.0%}")
        assert row["reuse in L2"] == f"{found.reuse:.1f}"
        seen.add((row["GPU"], row["head_dim"]))
    assert seen == {(name, dim) for name in NAMED for dim in ("64", "128")}


DISASSEMBLY = """
.L_x_1:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_2:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8] ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   NOP ;
        /*0070*/                   BRA `(.L_x_3) ;
"""


def test_the_step_is_the_shortest_loop_that_multiplies() -> None:
    if sys.platform != "linux":
        pytest.importorskip("triton", reason="triton is published for Linux only")
    from sparseprefill.kernels.triton_inspect import step_instructions

    assert step_instructions(DISASSEMBLY) == 3
    with pytest.raises(ValueError, match="no loop multiplies"):
        step_instructions(re.sub("HGMMA", "FFMA", DISASSEMBLY))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux only")
def test_the_command() -> None:
    """Prints what the page shows, in the page's form; the compiler may have changed what the page shows."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sparseprefill.kernels.triton_inspect", "--roofline", "--markdown"]
    run = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    first, *lines = run.stdout.splitlines()
    assert first.startswith("counted, not timed (triton ")
    page = PAGE.read_text()
    tables = [line for line in lines if line[:1] == "|"]
    titles = [line for line in tables if line.startswith(("| capability", "| GPU"))]
    assert len(titles) == 2
    assert all(title in page for title in titles), json.dumps(titles)
    assert len(tables) == 2 * 2 + 6 + 8
