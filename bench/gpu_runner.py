"""Stages in processes of their own, item by item: what hangs or crashes costs only itself.

A stage is a module with ``items(context)`` and ``run(item, context)``. Its process writes a line to
a journal before and after every item; so a process that dies tells which item it died of, and one
that follows goes on with the next. Nothing here needs torch, nor a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Found = dict[str, Any]

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0  # beyond its budget, for a stage to end by itself
_MOST_RESTARTS = 8
_SPOILED = 3  # exit status of a process whose device is unusable
BAD = ("failed", "crashed", "hung")


class NotRun(Exception):
    """Why an item cannot be judged here; it is no failure."""


@dataclass(frozen=True)
class Stage:
    """What a stage is, and how much of the time is its own.

    Attributes:
        name: shown, and given to the module in the context.
        module: in ``bench/``.
        seconds: that it wants on a GPU; all stages shrink alike where time is short.
        at_least: seconds under which it is not worth to begin.
        item_seconds: an item that takes longer hangs.
        host_seconds: that it wants on the host executor; 0 for one that needs a GPU.
        essential: the others need it, so that it may take all the time there is.
    """

    name: str
    module: str
    seconds: float
    at_least: float = 2.0
    item_seconds: float = 60.0
    host_seconds: float = 0.0
    essential: bool = False


@dataclass
class Context:
    """What the items of a stage get.

    Attributes:
        stage: its name.
        device: ``"cuda"``, ``"host_cuda"`` (CUDA kernels on the host executor), or ``"cpu"``.
        build: folder of the host executor and of the twins.
        seed: of random data.
        deadline: of the stage, as ``time.monotonic()`` tells it.
        rest: items that are still to run, with the one under way.
        note: saves facts of an item that is still under way.
    """

    stage: str
    device: str
    build: Path
    seed: int = 0
    deadline: float = float("inf")
    rest: int = 1
    note: Callable[[Found], None] = field(default=lambda facts: None)

    def left(self) -> float:
        """Seconds of the stage."""
        return self.deadline - time.monotonic()

    def share(self, items: float = 1.0) -> float:
        """Seconds of so many items, if all of those left get alike."""
        return max(self.left(), 0.0) * min(items / self.rest, 1.0)


# ---- time ----


def wanted(stage: Stage, device: str) -> float:
    """Seconds that a stage wants on a device."""
    return stage.host_seconds if device == "host_cuda" else stage.seconds


def budget(stage: Stage, rest: list[Stage], left: float, device: str) -> float:
    """The share of the time left that a stage gets, ``rest`` being those after it.

    What others did not need goes to those that follow; at most twice as much as was wanted.
    """
    own = wanted(stage, device)
    if stage.essential and own:
        return left
    total = own + sum(wanted(one, device) for one in rest)
    return min(left, left * own / total, 2 * own) if total else 0.0


# ---- in the stage's process ----


def serve(module: Any, context: Context, journal: Path) -> int:
    """Run the items that the journal does not know yet; returns the exit status."""
    begun = {line["begin"] for line in read_journal(journal) if "begin" in line}
    with journal.open("a", encoding="utf-8") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()

        try:
            items = list(module.items(context))
        except NotRun as reason:
            write(items=[], reason=str(reason))
            return 0
        write(items=items)
        for number, item in enumerate(items):
            if item in begun or context.left() <= 0:
                continue
            context.rest = len(items) - number
            begin = time.monotonic()
            write(begin=item, time=time.time())
            context.note = lambda facts, item=item: write(note=item, facts=facts)
            found, usable = _run_item(module, item, context)
            write(end=item, seconds=round(time.monotonic() - begin, 3), **found)
            if not usable:
                return _SPOILED
    return 0


def _run_item(module: Any, item: str, context: Context) -> tuple[Found, bool]:
    """What an item found, and whether the device may be used on."""
    try:
        found = module.run(item, context)
    except NotRun as reason:
        found = {"status": "not run", "reason": str(reason)}
    except Exception as error:
        lines = traceback.format_exception(error)
        found = {"problems": [_short("".join(lines[-1:])), _short("".join(lines), 3000)]}
    usable = not found.pop("spoiled", False)
    if context.device == "cuda" and "torch" in sys.modules:
        try:
            sys.modules["torch"].cuda.synchronize()
        except Exception as error:
            found.setdefault("problems", []).append(f"the device: {_short(str(error))}")
            usable = False
    bad = bool(found.get("problems"))
    found.setdefault("status", "failed" if bad else "passed")
    return found, usable


def _short(text: str, length: int = 600) -> str:
    """The end of a text."""
    text = text.strip()
    return text if len(text) <= length else f"... {text[-length:]}"


def read_journal(path: Path) -> list[Found]:
    """Its lines; the last one of a process that was killed may be torn."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


# ---- around it ----


def findings(lines: list[Found]) -> list[Found]:
    """A dictionary an item, in the order in which they ran; those under way have no status."""
    found: dict[str, Found] = {}
    for line in lines:
        if "begin" in line:
            found[line["begin"]] = {"item": line["begin"], "began": line["time"]}
        elif "note" in line:
            found[line["note"]].setdefault("facts", {}).update(line["facts"])
        elif "end" in line:
            facts = found[line["end"]].get("facts", {}) | line.get("facts", {})
            ended = {k: v for k, v in line.items() if k not in ("end", "facts")}
            found[line["end"]] |= ended | ({"facts": facts} if facts else {})
    return list(found.values())


def run_stage(
    stage: Stage,
    command: list[str],
    journal: Path,
    seconds: float,
    changed: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Run a stage's process, again after each item that kills it, until its time is over.

    Args:
        stage: which.
        command: of the process, which appends to the journal.
        journal: its file.
        seconds: budget.
        changed: gets what is found so far whenever an item has ended.
    """
    begin = time.monotonic()
    log = journal.with_suffix(".log")
    fates: dict[str, Found] = {}
    cut, exits, trouble = False, [], ""

    def summary() -> Found:
        lines = read_journal(journal)
        items = [fates.get(one["item"], {}) | one for one in findings(lines)]
        planned = next((line["items"] for line in lines if "items" in line), [])
        reason = next((line["reason"] for line in lines if "reason" in line), "")
        took = time.monotonic() - begin
        return summarise(stage, items, planned, reason or trouble, seconds, took, cut)

    while not cut and len(exits) < _MOST_RESTARTS:
        status, hung = None, None
        with log.open("ab") as output:
            position = output.tell()
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, **_own_group()
            )
        try:
            while status is None:
                try:
                    status = process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    now, open_item = time.monotonic() - begin, _open_item(journal, fates)
                    cut = now > seconds + _GRACE_SECONDS
                    if open_item and time.time() - open_item["began"] > stage.item_seconds:
                        hung = open_item["item"]
                    if cut or hung:
                        break
                    changed(summary())
        finally:
            _end(process)
        exits.append(status)
        open_item = _open_item(journal, fates)
        if hung:
            reason = f"took more than {stage.item_seconds:.0f} s"
            fates[hung] = {"status": "hung", "problems": [reason]}
        elif cut and open_item:
            fates[open_item["item"]] = {"status": "not run", "reason": "no time left"}
        elif status not in (0, None):
            end = _tail(log, position)
            if open_item:
                problem = f"exit status {status}: {end}"
                fates[open_item["item"]] = {"status": "crashed", "problems": [problem]}
            elif status != _SPOILED:
                trouble = f"exit status {status}: {end}"
                break
        if status == 0 and not hung:
            break
        changed(summary())
    return summary()


def _own_group() -> dict[str, Any]:
    return {"start_new_session": True} if os.name == "posix" else {}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and those that it started."""
    if process.poll() is None or os.name == "posix":
        try:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        except (ProcessLookupError, PermissionError):
            pass
    process.wait()


def _open_item(journal: Path, fates: dict[str, Found]) -> Found | None:
    """The item that has begun and not ended, and is not given up."""
    for one in findings(read_journal(journal)):
        if "status" not in one and one["item"] not in fates:
            return one
    return None


def _tail(log: Path, position: int) -> str:
    with log.open("rb") as file:
        file.seek(position)
        return _short(file.read().decode(errors="replace"), 1500)


def summarise(
    stage: Stage,
    items: list[Found],
    planned: list[str],
    reason: str,
    seconds: float,
    took: float,
    cut: bool,
) -> Found:
    """A stage as it is saved."""
    under_way = [one for one in items if "status" not in one]
    absent = len(planned) - len(items)
    statuses = [one.get("status") for one in items]
    if any(status in BAD for status in statuses) or (reason.startswith("exit status")):
        status = "failed"
    elif not planned or all(s == "not run" for s in statuses):
        status = "not run"
    elif absent or cut or under_way:
        status = "cut short"
    else:
        status = "passed"
    if not reason and status == "not run":
        reason = next((one["reason"] for one in items if "reason" in one), "no time left")
    return {
        "stage": stage.name,
        "status": status,
        "reason": reason,
        "seconds": round(took, 2),
        "budget": round(seconds, 2),
        "cases": sum(one.get("cases", 0) for one in items),
        "planned": len(planned),
        "passed": statuses.count("passed"),
        "not_run": statuses.count("not run") + max(absent, 0),
        "items": items,
    }


def not_run(stage: Stage, reason: str, seconds: float = 0.0) -> Found:
    """A stage that was not begun."""
    return summarise(stage, [], [], reason, seconds, 0.0, False)


def problems(found: Found) -> Iterator[str]:
    """``item: problem`` of a stage."""
    if found["status"] == "failed" and found["reason"]:
        yield found["reason"]
    for one in found["items"]:
        for problem in one.get("problems", ())[:1]:
            yield f"{one['item']}: {problem}"


def load(module: str) -> Any:
    """A stage's module."""
    return importlib.import_module(module)
