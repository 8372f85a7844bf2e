"""Stage tests: the op tests of ``python_tests`` that take a device, on ``cuda``."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from gpu_runner import Context, Found, NotRun

TESTS = Path(__file__).resolve().parents[1] / "python_tests"
_DEVICE = "KEYE_OPS_SUITE_DEVICE"
_USES_DEVICE = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)


def items(context: Context) -> list[str]:
    """Files with tests that take the fixture ``device``."""
    if importlib.util.find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    files = sorted(TESTS.glob("test_*.py"))
    return [path.name for path in files if _USES_DEVICE.search(path.read_text(encoding="utf-8"))]


def run(item: str, context: Context) -> Found:
    """A file."""
    device = "cuda" if context.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(TESTS / item),
        ]
        # Names of parameters are parts of names: host_cuda has cuda in it.
        command += ["-k", f"{device} and not host_cuda", f"--junit-xml={report}", "--tb=line"]
        if importlib.util.find_spec("xdist") and device == "cuda":
            command += ["-n", str(min(6, os.cpu_count() or 1))]
        limit = max(context.share(2.5), 10)
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, _DEVICE: device, "PYTHONPATH": os.pathsep.join(paths)}
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise NotRun(f"takes more than the {limit:.0f} s that were left") from None
        if not report.exists():
            text = (result.stdout + result.stderr)[-1500:]
            return {"problems": [f"pytest ended with {result.returncode}: {text}"]}
        return read_report(report)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """As a plugin of pytest: leave the tests whose parameter ``device`` is the one wanted."""
    device = os.environ.get(_DEVICE)
    chosen = [one for one in items if _device_of(one) == device]
    config.hook.pytest_deselected(items=[one for one in items if _device_of(one) != device])
    items[:] = chosen


def _device_of(item: Any) -> Any:
    return item.callspec.params.get("device") if hasattr(item, "callspec") else None


def read_report(path: Path) -> Found:
    """What a JUnit file tells."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    problems = []
    root = ElementTree.parse(path).getroot()
    for suite in root.iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    for case in root.iter("testcase"):
        for bad in (*case.iter("failure"), *case.iter("error")):
            message = (bad.get("message") or bad.text or "").strip().splitlines() or [""]
            problems.append(f"{case.get('name')}: {message[0][:300]}")
    ran = counts["tests"] - counts["skipped"]
    if not ran and not problems:
        raise NotRun(f"no test ran, {counts['skipped']} were skipped")
    return {"cases": ran, "problems": problems[:20], "facts": counts}
