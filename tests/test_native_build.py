"""The native library: built once and checked, kept by machine, loaded without a compiler, refused with a reason."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sparseprefill.cli import main
from sparseprefill.contracts import AttentionOutput
from sparseprefill.kernels import choose_implementation, native_build, why_not
from sparseprefill.kernels.low_bit import EstimatedLogits, block_max
from sparseprefill.kernels.native_check import (
    attention_cases,
    check_cases,
    check_library,
    why_not_attention,
    why_not_equal,
)
from sparseprefill.kernels.products import ProductShape, choose_product, tile_scores
from sparseprefill.kernels.reference import reference_attention

CASES = dict(check_cases())
REAL_CHECK = native_build._check
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no native library for Windows")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are kept in this test; not there yet."""
    monkeypatch.setenv(native_build.VARIABLE, str(tmp_path / "native"))
    return tmp_path / "native"


Fake = Callable[..., Path]
Check = Callable[[Path], str]


@pytest.fixture
def check() -> Check:
    """The real one, where `fake` has put another in its place."""
    return REAL_CHECK


@pytest.fixture
def fake(tmp_path: Path, native_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A compiler, named by CXX, that copies the library built for this session. Gives the log of its calls.

    Libraries are then not checked again: that takes seconds, and there are tests of it.
    """
    (made,) = native_folder.glob("*/*.so")
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(native_build, "_check", lambda path: "few")

    def write(body: str = "", *, version: str = "echo fake 1.0", syntax: str = ":") -> Path:
        script = tmp_path / "fake-c++"
        script.write_text(
            "#!/bin/sh\nfor last; do :; done\n"
            f'case "$*" in --version) {version}; exit;; *-fsyntax-only*) {syntax}; exit;; esac\n'
            f'echo called >> {log}\n{body}\ncp {made} "$last"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return write


@pytest.fixture
def standing(folder: Path, native_folder: Path) -> Path:
    """A copy of the session's library in this test's folder, not looked at yet. Gives its file."""
    shutil.copytree(native_folder, folder)
    (made,) = folder.glob("*/*.so")
    return made


def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Make `source` what is built, in place of the kernel."""
    path = tmp_path / "native_block_max.cpp"
    path.write_text(source)
    monkeypatch.setattr(native_build, "SOURCES", (path,))


def interface(abi: int = native_build.ABI, before: str = "", block_max: str = "return 0;") -> str:
    return f"""
extern "C" int sparseprefill_abi(void) {{ {before} return {abi}; }}
extern "C" const char *sparseprefill_instructions(void) {{ return "none"; }}
extern "C" int sparseprefill_block_max(void) {{ {block_max} }}
extern "C" int sparseprefill_quantize(void) {{ return 0; }}
extern "C" int sparseprefill_attention(void) {{ return 0; }}
"""


class TestWhatIsBuilt:
    @pytest.mark.parametrize("name", CASES)
    def test_it_scores_as_the_reference(self, native: Path, name: str) -> None:
        logits = CASES[name]
        assert choose_product(ProductShape.of(logits)) == "native"
        assert why_not_equal(tile_scores(logits, "native"), logits) is None

    def test_its_record_says_how(self, native: Path) -> None:
        found = native_build.built()
        assert found is not None
        path, record = found
        assert path.parent.parent == native
        assert path.name == record.file
        assert record.compiler == native_build.find_compiler().describe()
        assert record.flags.endswith(" ".join(native_build.FLAGS))
        assert json.loads(path.with_name("record.json").read_text()) == dataclasses.asdict(record)
        assert sorted(each.name for each in path.parent.iterdir()) == [path.name, "record.json"]

    def test_a_library_is_for_one_source_processor_and_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [native_build._key(), native_build._key()]
        assert keys[0] == keys.pop()
        monkeypatch.setenv("CXX", "/no/such/compiler")
        assert native_build._key() == keys[0], "loading must not need the compiler"
        for name, value in (
            ("ABI", native_build.ABI + 1),
            ("FLAGS", (*native_build.FLAGS, "-g")),
            ("_processor", lambda: ("another",)),
            ("sysconfig", type("Other", (), {"get_platform": staticmethod(lambda: "moon-x86_64")})),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(native_build, name, value)
                keys.append(native_build._key())
        compiled(tmp_path, monkeypatch, native_build.SOURCES[0].read_text() + "\n")
        keys.append(native_build._key())
        assert len(set(keys)) == 6

    def test_where_it_lies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(native_build.VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert native_build.cache_folder() == tmp_path / "sparseprefill" / "native"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert native_build.cache_folder() == tmp_path / ".cache" / "sparseprefill" / "native"


class TestBuilding:
    def test_once_by_force_and_by_another_compiler(self, folder: Path, fake: Fake) -> None:
        log, said = fake(), []
        path = native_build.build(say=said.append)
        assert (said, path.parent.parent) == ([], folder)
        assert native_build.build(say=said.append) == path
        assert said.pop() == "built already: sparseprefill build-cpu --force builds it again"
        assert log.read_text().count("called") == 1
        native_build.build(force=True, say=said.append)
        assert log.read_text().count("called") == 2
        fake(version="echo fake 2.0")
        native_build.build(say=said.append)
        (line,) = said
        assert "(fake 1.0), the compiler is now" in line
        assert log.read_text().count("called") == 3
        found = native_build.built()
        assert found is not None
        assert "fake 2.0" in found[1].compiler
        assert found[1].flags == f"{native_build._processor_flag()} {' '.join(native_build.FLAGS)}"

    def test_a_compiler_that_has_gone_is_no_reason(self, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "/no/such/compiler")
        assert native_build.build() == standing

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            (
                {"body": "echo one; echo 'kernel.cpp:3: error: no' >&2; exit 1"},
                "could not compile.*kernel.cpp:3: error",
            ),
            ({"body": "exit 1"}, "it said nothing and ended with 1"),
            ({"body": "exit 0"}, "made no library and said nothing"),
            ({"syntax": "echo no licence >&2; exit 1"}, "cannot compile anything: no licence"),
            ({"version": "echo broken >&2; exit 1"}, "does not run: broken"),
        ],
        ids=["error", "silent", "nothing", "unusable", "broken"],
    )
    def test_a_compiler_that_fails(self, folder: Path, fake: Fake, script: dict[str, str], message: str) -> None:
        fake(**script)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            native_build.build()
        assert not list(folder.glob("*/*"))
        assert "it is not built" in (native_build.why_not_built() or "") or list(folder.glob("*"))
        assert native_build.library() is None

    def test_a_flag_that_is_refused_is_said(self, folder: Path, fake: Fake) -> None:
        fake(syntax='case "$*" in *native*) echo "unknown flag" >&2; exit 1;; esac')
        said: list[str] = []
        native_build.build(say=said.append)
        assert f"refuses {native_build._processor_flag()}: built without it" in said[0]
        found = native_build.built()
        assert found is not None
        assert found[1].flags == " ".join(native_build.FLAGS)

    @pytest.mark.parametrize("cause", ["compiler", "check"])
    def test_without_amx_where_that_does_not_pass(
        self, folder: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, cause: str
    ) -> None:
        """Slower, and said, rather than nothing; where there is no AMX it is not tried twice."""
        log = folder.parent / "log"
        refuse = 'case "$*" in *NO_TILES*) ;; *) echo "tdpbf16ps: no" >&2; exit 1;; esac' if cause == "compiler" else ""
        fake(f'echo "$*" >> {log}\n{refuse}')

        def check(path: Path) -> str:
            if cause == "check" and "NO_TILES" not in log.read_text():
                raise ValueError("it failed its check")
            return "few"

        monkeypatch.setattr(native_build, "_check", check)
        said: list[str] = []
        with pytest.raises(ValueError, match="tdpbf16ps: no" if cause == "compiler" else "failed its check"):
            native_build.build(say=said.append)
        assert said == []
        assert log.read_text().count("called") == 1
        monkeypatch.setattr(native_build, "_processor", lambda: ("flags:fpu amx_bf16 amx_tile",))
        native_build.build(say=said.append)
        (line,) = said
        assert "tdpbf16ps: no" in line if cause == "compiler" else line.startswith("it failed its check;")
        assert line.endswith("building it again without AMX (-DSPARSEPREFILL_NO_TILES)")
        found = native_build.built()
        assert found is not None
        assert found[1].flags.endswith(native_build.WITHOUT_TILES)
        assert native_build.build(say=said.append) == found[0]
        assert log.read_text().count("called") == 3

    def test_no_compiler(self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(ValueError, match=r"no C\+\+ compiler .*: install g\+\+ or clang\+\+, or set CXX"):
            native_build.build()
        assert "no C++ compiler" in (native_build.why_no_compiler() or "")
        for name, message in (("no-such", "'no-such', which is no program"), ("'", "is no command: No closing")):
            monkeypatch.setenv("CXX", name)
            with pytest.raises(ValueError, match=message):
                native_build.build()
        (tmp_path / "text").write_text("no program")
        (tmp_path / "text").chmod(0o755)
        monkeypatch.setenv("CXX", "text --fast")
        with pytest.raises(ValueError, match="text cannot be run: Exec format"):
            native_build.build()

    def test_arguments_of_the_compiler(self, folder: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
        fake('test "$OWN" = 1 || exit 1')
        with pytest.raises(ValueError, match="could not compile"):
            native_build.build()
        monkeypatch.setenv("CXX", f"env OWN=1 {os.environ['CXX']}")
        native_build.build()
        found = native_build.built()
        assert found is not None
        assert "env OWN=1" in found[1].compiler

    @pytest.mark.parametrize("place", ["/dev/null/native", "file", "forbidden"])
    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        fake()
        (tmp_path / "file").touch()
        if place == "forbidden":  # for who may write anywhere too

            def refuse(path: Path, *arguments: object, **options: object) -> None:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

            monkeypatch.setattr(Path, "mkdir", refuse)
        monkeypatch.setenv(native_build.VARIABLE, str(tmp_path / place))
        with pytest.raises(ValueError, match=r"cannot be used: .* Name another one with \$SPARSEPREFILL_NATIVE"):
            native_build.build()

    def test_what_a_killed_build_left_is_swept(self, folder: Path, fake: Fake) -> None:
        fake()
        left = folder / native_build._key() / "building-x" / "library.so"
        left.parent.mkdir(parents=True)
        left.touch()
        native_build.build()
        assert not left.parent.exists()

    def test_windows_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_build, "why_not_here", lambda: "not for Windows")
        with pytest.raises(NotImplementedError, match="not for Windows"):
            native_build.build()
        assert native_build.why_not_built() == "not for Windows"
        assert not folder.exists()
        monkeypatch.undo()
        monkeypatch.setattr(sys, "platform", "win32")
        assert "Windows" in (native_build.why_not_here() or "")


class TestTheCheck:
    def test_a_wrong_library_is_refused(self, tmp_path: Path, folder: Path, native_folder: Path) -> None:
        (tmp_path / "wrong.cpp").write_text(interface())  # computes nothing
        made = tmp_path / "wrong.so"
        command = native_build.find_compiler().command
        subprocess.run([*command, *native_build.FLAGS, tmp_path / "wrong.cpp", "-o", made], check=True)
        with pytest.raises(ValueError, match=r" bits, head_dim .*: "):
            check_library(made)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "without",
        ["-mno-avx512f", "-mno-avx512f -mno-avx2", "-march=x86-64", "-march=x86-64 -DSPARSEPREFILL_GENERIC"],
        ids=["avx2", "portable", "oldest", "generic"],
    )
    @pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have one way alone")
    def test_the_ways_of_older_processors_pass_it(
        self, tmp_path: Path, native_folder: Path, folder: Path, without: str
    ) -> None:
        """The kernel as it is compiled where there is no AVX-512, no AVX2, nothing but SSE2, or no vectors of x86."""
        made = tmp_path / "older.so"
        command = [*native_build.find_compiler().command, "-march=native", *without.split(), *native_build.FLAGS]
        subprocess.run([*command, *native_build.SOURCES, "-o", made], check=True)
        check_library(made)
        loaded = native_build.library()
        assert loaded is not None
        assert loaded._name == str(made)
        assert not loaded.sparseprefill_instructions().startswith(b"avx512")
        # torch with wider vectors is faster than a library without, and is taken unless this is asked for by name
        inputs, index = next(iter(attention_cases()))[1:]
        portable = loaded.sparseprefill_instructions() == b"portable"
        wider = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        assert portable == (without != "-mno-avx512f")
        assert choose_implementation(inputs, index) == ("cpu" if portable and wider else "native")
        assert why_not("native", inputs, index) is None
        assert ("torch uses AVX" in (native_build.why_torch_is_faster() or "")) == (portable and wider)

    def test_what_fails_is_never_installed(
        self, standing: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, check: Check
    ) -> None:
        """And what was there stays."""
        fake()
        before = {path: path.read_bytes() for path in standing.parent.iterdir()}
        monkeypatch.setattr(native_build, "_check", check)
        for code, message in (
            ("import sys; sys.exit('4 bits: scores are off')", "failed its check: 4 bits: scores are off: it is not"),
            ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", r"crashed in its check \(SIGILL\)"),
            ("import time; time.sleep(60)", "was not done after 0.5 seconds"),
        ):
            monkeypatch.setattr(native_build, "_COMPARISON", code)
            monkeypatch.setattr(native_build, "_CHECK_SECONDS", 0.5 if "sleep" in code else 60)
            with pytest.raises(ValueError, match=message):
                native_build.build(force=True)
            assert {path: path.read_bytes() for path in standing.parent.iterdir()} == before
        assert native_build.library() is not None

    def test_it_sees_what_attention_can_forget(self) -> None:
        """The reference passes; shorter lists, no output, or a wrong count of skipped tiles do not."""
        seen = set()
        for name, inputs, index in itertools.islice(attention_cases(), 8):
            right = reference_attention(inputs, index)
            rounded = AttentionOutput(right.output.to(inputs.query.dtype), right.lse.float(), right.skipped)
            assert why_not_attention(rounded, inputs, index) is None, name
            fewer = dataclasses.replace(index, count=(index.count - 1).clamp(min=1), skip=None)
            wrong = {"fewer": reference_attention(inputs, fewer), "none": AttentionOutput(right.output * 0, right.lse)}
            if right.skipped is not None:
                wrong["count"] = dataclasses.replace(rounded, skipped=right.skipped + 1)
                wrong["uncounted"] = dataclasses.replace(rounded, skipped=None)
            if bool((right.lse == -torch.inf).any()):
                wrong["not empty"] = dataclasses.replace(rounded, output=rounded.output + 1e-6)
            for what, result in wrong.items():
                assert why_not_attention(result, inputs, index) is not None, (name, what)
            seen |= wrong.keys()
        assert seen == {"fewer", "none", "count", "uncounted", "not empty"}

    @pytest.mark.slow
    def test_a_wrong_kernel_from_end_to_end(
        self, tmp_path: Path, standing: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(native_build, "_key", lambda: standing.parent.name)
        compiled(tmp_path, monkeypatch, interface())
        with pytest.raises(ValueError, match=r"failed its check: . bits, .*: it is not installed"):
            native_build.build(force=True)
        assert native_build.library() is not None

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (interface(before="__builtin_trap();"), r"crashed in its check \(SIG(ILL|TRAP)\): it is not installed"),
            (interface(abi=77), f"has interface '77', this version needs {native_build.ABI}: it is not installed"),
            (interface().replace("sparseprefill_abi", "other"), "undefined symbol.*: it is not installed"),
        ],
        ids=["crash", "abi", "function"],
    )
    def test_other_libraries_neither(
        self, tmp_path: Path, folder: Path, native_folder: Path, monkeypatch: pytest.MonkeyPatch, source: str,
        message: str,
    ) -> None:  # fmt: skip
        compiled(tmp_path, monkeypatch, source)
        with pytest.raises(ValueError, match=message):
            native_build.build()
        assert not list(folder.glob("*/*"))

    @pytest.mark.slow
    def test_a_crash_in_the_comparison(
        self, tmp_path: Path, folder: Path, native_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled(tmp_path, monkeypatch, interface(block_max="__builtin_trap();"))
        with pytest.raises(ValueError, match=r"crashed in its check \(SIG(ILL|TRAP)\)"):
            native_build.build()

    def test_it_accepts_the_reference(self) -> None:
        assert all(why_not_equal(block_max(logits), logits) is None for logits in CASES.values())

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("shift", torch.zeros_like),
            ("reference", torch.zeros_like),
            ("bias", lambda bias: bias.masked_fill(bias.isfinite(), 0)),
            ("bias", lambda bias: bias.nan_to_num(neginf=0)),
            ("low", torch.zeros_like),
            ("high", lambda high: high + 1),
            ("anchor", lambda anchor: anchor - anchor),
            ("scale", lambda scale: scale * 1.001),
            ("softcap", lambda softcap: None),
        ],
        ids=["shift", "reference", "bias", "padding", "low", "high", "anchor", "scale", "softcap"],
    )
    def test_it_sees_what_a_kernel_can_forget(self, field: str, change: Callable[..., object]) -> None:
        def wrong(logits: EstimatedLogits) -> EstimatedLogits:
            return dataclasses.replace(logits, **{field: change(getattr(logits, field))})

        concerned = [logits for logits in CASES.values() if field != "softcap" or logits.softcap]
        found = [why_not_equal(block_max(wrong(logits)), logits) for logits in concerned]
        assert len(concerned) >= 3
        assert all(found)

    def test_it_sees_codes_and_scales(self) -> None:
        for logits in CASES.values():
            for part in ("query", "key"):
                own = getattr(logits, part)
                codes = own.codes.clone()
                codes[..., -1] = 0  # the last byte of each: the tail of the channels, if it is not padding
                scaled = dataclasses.replace(own, scale=own.scale * 1.001)
                for changed in (scaled, dataclasses.replace(own, codes=codes)):
                    if changed is scaled or not torch.equal(codes, own.codes):
                        wrong = dataclasses.replace(logits, **{part: changed})
                        assert why_not_equal(block_max(wrong), logits) is not None


class TestLoading:
    def test_nothing_is_built_by_asking(self, folder: Path) -> None:
        assert native_build.library() is None
        assert native_build.built() is None
        assert native_build.why_not_built() == (
            "it is not built: run `sparseprefill build-cpu`, once on this machine (it needs a C++ compiler)"
        )
        assert not folder.exists()

    def test_no_compiler_is_needed(self, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "/no/such/compiler")
        monkeypatch.setattr(native_build, "_run", None)  # nothing is run at all
        assert native_build.why_not_built() is None

    def test_once_a_process_by_whichever_thread(self, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        looked: list[Path] = []
        real = native_build._look

        def slowly(folder: Path) -> object:
            looked.append(folder)
            time.sleep(0.05)
            return real(folder)

        monkeypatch.setattr(native_build, "_look", slowly)
        found: list[ctypes.CDLL | None] = []
        threads = [threading.Thread(target=lambda: found.append(native_build.library())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(looked) == 1
        assert len({id(each) for each in found}) == 1
        assert found[0] is not None
        standing.unlink()
        assert native_build.library() is found[0]

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is not the one that was built: it is damaged"),
            (lambda path: path.write_bytes(b""), "it is damaged"),
            (lambda path: path.unlink(), "there is no native library at"),
            (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
            (lambda path: path.with_name("record.json").write_text("{"), "is not a JSON record"),
            (lambda path: path.with_name("record.json").write_text("{}"), "is no record of a native library"),
            (lambda path: rename_in_record(path, "../x.so"), "names '../x.so', which is no native library"),
        ],
        ids=["truncated", "empty", "missing", "folder", "no json", "another json", "path"],
    )
    def test_damage_is_a_reason(
        self, standing: Path, fake: Fake, damage: Callable[[Path], object], reason: str
    ) -> None:
        damage(standing)
        assert native_build.library() is None
        said = native_build.why_not_built() or ""
        assert reason in said
        assert said.endswith("`sparseprefill build-cpu --force` builds it again")
        if not standing.is_dir():
            fake()
            again: list[str] = []
            native_build.build(say=again.append)
            assert again == [f"{said}; building it again"]
            assert native_build.library() is not None

    def test_another_interface_is_a_reason(
        self, tmp_path: Path, standing: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(native_build, "_key", lambda: standing.parent.name)
        monkeypatch.setattr(native_build, "ABI", native_build.ABI + 1)
        assert f"has interface {native_build.ABI - 1}, this version needs" in (native_build.why_not_built() or "")

    def test_a_library_without_our_functions_is_a_reason(self, tmp_path: Path) -> None:
        other = Path(torch._C.__file__)
        with pytest.raises(ValueError, match=r"lacks a function: .*sparseprefill_abi"):
            native_build._load(other)
        (tmp_path / "text.so").write_text("no library")
        with pytest.raises(ValueError, match="cannot be loaded: "):
            native_build._load(tmp_path / "text.so")

    def test_a_library_of_another_machine_is_said(self, standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_build, "_processor", lambda: ("another",))
        assert "is of another version or for another processor: run" in (native_build.why_not_built() or "")


def rename_in_record(path: Path, name: str) -> None:
    record = path.with_name("record.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "file": name}))


HOLDER = (
    "import sys, fcntl, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
    "sys.stdin.read()"
)


class TestTwoAtOnce:
    def test_the_second_waits_and_finds_it_built(self, folder: Path, fake: Fake) -> None:
        log = fake("sleep 0.3")
        said: list[str] = []
        paths: list[Path] = []
        threads = [threading.Thread(target=lambda: paths.append(native_build.build(say=said.append))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert log.read_text().count("called") == 1
        assert len(paths) == 3
        assert len(set(paths)) == 1
        assert said.count(f"another process builds in {folder}: waiting for it") == 2
        assert sum("built already" in line for line in said) == 2

    def test_it_waits_no_longer_than_it_is_told(self, folder: Path, fake: Fake) -> None:
        fake()
        folder.mkdir()
        holder = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HOLDER, str(folder / "lock")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=r"another process still builds in .*: try again when it is done"):
                native_build.build(wait=0.1)
            holder.kill()
        native_build.build(wait=0.1)  # the file of a process that has died is no obstacle
        assert native_build.library() is not None

    def test_a_lock_that_was_removed_is_made_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever waited for the process that removed everything must not go on with a file that nobody else sees."""
        real, removed = native_build.files.lock, []

        def lock(file: object, path: Path) -> None:
            real(file, path)
            if not removed:
                removed.append((folder / "lock").unlink())

        monkeypatch.setattr(native_build.files, "lock", lock)
        with native_build._locked(folder, print, 1):
            assert (folder / "lock").exists()
            with pytest.raises(ValueError, match="another process still"), native_build._locked(folder, print, 0):
                pass

    @pytest.mark.slow
    def test_two_processes(self, folder: Path, native_folder: Path) -> None:
        command = [sys.executable, "-c", "from sparseprefill.cli import main; main()", "build-cpu"]
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        said = [each.communicate() for each in running]
        assert [each.returncode for each in running] == [0, 0], said
        assert sorted("built already" in out for out, _ in said) == [False, True]
        assert len(list(folder.glob("*/*"))) == 2
        assert native_build.library() is not None


class TestRemoving:
    def test_nothing_else_is_taken(self, folder: Path, standing: Path) -> None:
        other = folder / ("0" * 20) / standing.name
        shutil.copytree(standing.parent, other.parent)
        strangers = [folder / "notes.txt", other.with_name("mine.so")]
        for path in strangers:
            path.touch()
        assert native_build.why_not_built() is None
        assert native_build.remove() == 2
        assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(strangers)
        assert "another version or for another processor" in (native_build.why_not_built() or "")

    def test_all_of_it(self, folder: Path, standing: Path) -> None:
        assert native_build.remove() == 1
        assert not folder.exists()
        assert native_build.remove() == 0
        assert not folder.exists()


class TestCommand:
    def run(self, *arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["build-cpu", *arguments])
        assert "Traceback" not in done.output
        return done.exit_code, done.output

    def test_it_says_where_and_for_what(self, folder: Path, fake: Fake) -> None:
        fake()
        code, said = self.run()
        assert code == 0
        (path,) = folder.glob("*/*.so")
        for word in (str(path), "few", "fake 1.0", "passed", *native_build.FLAGS):
            assert word in said
        assert "built already" in self.run()[1]
        assert "built already" not in self.run("--force")[1]
        assert self.run("--remove") == (0, f"removed 1 library from {folder}\n")
        assert self.run("--remove") == (0, "nothing is built\n")

    def test_refusals(self, folder: Path, fake: Fake) -> None:
        fake("echo wrong >&2; exit 1")
        assert self.run() == (1, self.run()[1])
        assert "could not compile the native library: wrong" in self.run()[1]
        assert self.run("--force", "--remove") == (1, "Error: --force builds, --remove removes: give one of them\n")
