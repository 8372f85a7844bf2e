"""The mutations of a kernel's source, and the runner on a toy that is tested well or not at all."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutation.operators import mutations

RUN = Path(__file__).parent / "mutation" / "run.py"
SOURCE = """\
#include "a/b.cuh"  // 1 + 2
template <int kSize, class T = int>
KEYE_KERNEL(128, 2) kernel(const T* x, float (&y)[4]) {
  static_assert(sizeof(T) < 4, "1 + 2");
%s
}
"""


def replacements(code):
    """(operator, line after the mutation) of every mutation of one line of a kernel."""
    text = SOURCE % code
    assert mutations(SOURCE % "") == []
    found = mutations(text)
    assert all(each.apply(text).count("\n") == text.count("\n") for each in found)
    assert {each.line(text) for each in found} <= {5}
    return {(each.operator, each.apply(text).splitlines()[4].strip()) for each in found}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a < b;", {("relational", "a <= b;"), ("relational", "a >= b;")}),
        ("a == b;", {("relational", "a != b;")}),
        ("a * -b;", {("arithmetic", "a + -b;"), ("unary", "a * b;")}),
        ("a && !b;", {("logical", "a || !b;"), ("unary", "a && b;")}),
        ("a >> b;", {("bitwise", "a << b;")}),
        ("a << b;", {("bitwise", "a >> b;")}),
        ("a += b;", {("assignment", "a -= b;")}),
        ("a = 4u;", {("constant", "a = 5u;"), ("constant", "a = 3u;")}),
        ("a = 0xfu;", {("constant", "a = (0xfu + 1);"), ("constant", "a = (0xfu - 1);")}),
        ("a = min(b, c);", {("extreme", "a = max(b, c);")}),
        ("a = x[i];", {("index", "a = x[(i) + 1];")}),
        ("a = b ? c : d;", {
            ("condition", "a = b || true ? c : d;"),
            ("condition", "a = b && false ? c : d;"),
        }),
        ("if (a) f = g;", {("condition", "if (true) f = g;"), ("condition", "if (false) f = g;")}),
        ("while (a) b++;", {("condition", "while (false) b++;"), ("assignment", "while (a) b--;")}),
        ("sync_block();", {("call", ";")}),
        ("if (a.b) barrier[i].wait<kSize>(phase);", {
            ("call", "if (a.b) ;"),
            ("condition", "if (true) barrier[i].wait<kSize>(phase);"),
            ("condition", "if (false) barrier[i].wait<kSize>(phase);"),
            ("index", "if (a.b) barrier[(i) + 1].wait<kSize>(phase);"),
        }),
    ],
)  # fmt: skip
def test_each_operator(code, expected):
    assert replacements(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        "// a < b;",
        "/* a + 1 */",
        'f = "a < 1 && b";',
        "static_assert(kSize == 4);",
        "float x[4], y[kSize / 2];",
        "alignas(16) float (&x)[4];",
        "Chunk<kSize, 4>& chunk = f<2>(x, &y, *z);",
        "for (auto i : x) i->a = b;",
        "Guard guard(x);",
        "return f(x);",
        "ptx::forget(x);",
        "forget_unpacked(held);",
        "using Row = Vector<float, 4 + 2>;",
    ],
)
def test_what_is_left_alone(code):
    assert replacements(code) == set()


def test_lines_stay_where_they_are():
    text = "void f() {\n  wait(a,\n       b);\n  done = 1;\n}\n"
    (call, *_) = mutations(text)
    assert call.apply(text) == "void f() {\n  ;\n\n  done = 1;\n}\n"
    assert call.diff(text).splitlines()[:3] == ["-  wait(a,", "-       b);", "+  ;"]


CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(toy LANGUAGES CXX)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
add_library(toy SHARED csrc/toy/toy.cpp csrc/toy/other.cpp)
target_include_directories(toy PRIVATE csrc)
target_compile_options(toy PRIVATE -O2 -g -Wall -Werror)
"""
KERNEL = """
inline int twice_and_three(int x) {
  const int never_used = 7;
  return 2 * x + 3;
}
"""
TOY = """
#include "toy/toy.cuh"
extern "C" int toy(int x) { return twice_and_three(x); }
"""
THOROUGH = "assert [toy(x) for x in (0, 1, 5)] == [3, 5, 13]"
LOAD = (
    "import ctypes, os; toy = ctypes.CDLL(os.environ['KEYE_OPS_HOST_CUDA_DIR'] + '/libtoy.so').toy"
)


@pytest.fixture(scope="module", params=["Ninja", "Unix Makefiles"])
def toy(request, tmp_path_factory):
    tools = ["cmake", "g++", "objcopy", "ninja" if request.param == "Ninja" else "make"]
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"mutation needs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("toy")
    (folder / "csrc" / "toy").mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text(CMAKE)
    (folder / "csrc" / "toy" / "toy.cuh").write_text(KERNEL.replace("const int never", "int never"))
    (folder / "csrc" / "toy" / "toy.cpp").write_text(TOY)
    (folder / "csrc" / "toy" / "other.cpp").write_text("int other() { return 1; }\n")
    build = ["cmake", "-G", request.param, "-S", folder, "-B", folder / "build"]
    subprocess.run([*build, "-DCMAKE_CXX_FLAGS=-Wno-unused"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder / "build"], check=True, capture_output=True)
    return folder


def run(toy, code, *arguments):
    test = shlex.join([sys.executable, "-c", code])
    folders = ["--build", toy / "build", "--csrc", toy / "csrc", "--json", toy / "out.json"]
    command = [sys.executable, RUN, "--sources", toy / "csrc/toy/toy.cuh", *folders]
    result = subprocess.run(
        [*command, "--report", toy / "out.md", "--test", test, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return result, json.loads((toy / "out.json").read_text()) if result.returncode < 2 else {}


def test_a_thorough_test_kills_everything(toy):
    result, facts = run(toy, f"{LOAD}; {THOROUGH}", "--require", "1", "--at-least", "6")
    assert result.returncode == 0, result.stderr
    assert (facts["counted"], facts["share"]) == (6, 1.0)
    outcomes = [mutant["outcome"] for mutant in facts["mutants"]]
    assert outcomes.count("same code") == 2  # of the constant that nobody uses
    assert "6 of 6 mutants killed (100.0%)" in (toy / "out.md").read_text()


def test_a_test_that_sees_nothing_kills_nothing(toy):
    result, facts = run(toy, LOAD, "--sample", "3")
    assert result.returncode == 1
    assert "got 0.0% of 3" in result.stderr
    assert (facts["counted"], facts["share"]) == (3, 0.0)
    assert (toy / "out.md").read_text().count("+  return ") == 3


def test_a_mutant_argued_away_does_not_count_unless_it_is_killed(toy):
    lines = {"before": "return 2 * x + 3;", "after": "return 3 * x + 3;", "reason": "none"}
    (toy / "equivalent.json").write_text(json.dumps([{"file": "csrc/toy/toy.cuh", **lines}]))
    options = ("--equivalent", toy / "equivalent.json")
    _, facts = run(toy, LOAD, *options)
    outcomes = [mutant["outcome"] for mutant in facts["mutants"]]
    assert (facts["counted"], outcomes.count("argued to be equivalent")) == (5, 1)
    result, facts = run(toy, f"{LOAD}; {THOROUGH}", *options)
    assert result.returncode == 1
    assert "argued to be equivalent was killed" in result.stderr
    assert (facts["counted"], facts["share"]) == (5, 1.0)
    lines["before"] = "return 2 * y + 3;"
    (toy / "equivalent.json").write_text(json.dumps([{"file": "csrc/toy/toy.cuh", **lines}]))
    assert "must have the line 'return 2 * y + 3;'" in run(toy, LOAD, *options)[0].stderr


def test_the_same_seed_gives_the_same_mutants(toy):
    samples = [run(toy, LOAD, "--sample", "2", "--seed", seed)[1]["mutants"] for seed in "112"]
    diffs = [[mutant["diff"] for mutant in sample] for sample in samples]
    assert diffs[0] == diffs[1] != diffs[2]


def test_a_mutant_that_takes_too_long_is_killed(toy):
    slow = f"{LOAD}; import time; time.sleep(0 if toy(1) == 5 else 60)"
    _, facts = run(toy, slow, "--timeout", "1", "--sample", "1", "--seed", "4")
    assert facts["mutants"][-1]["reason"] == "took more than 1 s"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('passes without libraries')", "must fail when KEYE_OPS_HOST_CUDA_DIR has no"),
        (f"{LOAD}; assert toy(0) == 4, 'sound'", "must pass without a mutation, got exit status 1"),
    ],
)
def test_a_test_that_proves_nothing_is_refused(toy, code, message):
    result, _ = run(toy, code)
    assert result.returncode == 1
    assert message in result.stderr


def test_too_few_mutants_fail(toy):
    result, _ = run(toy, f"{LOAD}; {THOROUGH}", "--at-least", "7")
    assert result.returncode == 1
    assert "at least 7 mutants must be killed, got 100.0% of 6" in result.stderr
