"""Who is working on a run: a small file in its folder, so that it holds among machines that share a file system.

A claim is the file ``claim-N.json``: host, process and start. It is created exclusively, and its owner touches it
every `BEAT` seconds. Whoever takes a claim over creates ``claim-(N+1).json``, also exclusively, so that of several who
try one succeeds, then deletes the older one; an owner looks for its own file before it writes anything, and stops
without it.

No file lock is taken and no clock is compared with another: a claim is stale when a reader has not seen its time of
modification change for `STALE` seconds of the reader's own monotonic clock. On the owner's own machine it is free as
soon as the owner's process is gone.
"""

import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil

from spectreg_lab.storage.errors import RunError

BEAT = 5.0  # seconds between an owner's signs of life
STALE = 60.0  # seconds without one, after which others take over: longer than network file systems keep attributes
NAME = re.compile(r"claim-(\d+)\.json")


class ClaimedError(RunError):
    """Another process is working on the run."""


class ClaimLostError(RunError):
    """Another process has taken the run over from this one."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim. ``machine`` is the same for processes that see each other; ``node`` is the engine's word."""

    host: str = "another machine"
    process: int = 0
    started: str = ""
    token: str = ""
    machine: str | None = None
    node: str | None = None

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" if self.process else self.host

    def here(self) -> bool:
        """Whether the owner is a process that can be looked up: one of this machine since it was started."""
        return self.machine is not None and self.machine == _machine()

    def gone(self) -> bool:
        """Whether the owner is known to have ended: a process of this machine that is no more."""
        if not self.here():
            return False
        try:
            return psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class Claim:
    """A claim that this process holds."""

    path: Path
    token: str

    def check(self) -> None:
        """Make sure that the run is still ours.

        Raises:
            ClaimLostError: it was taken over, or its folder deleted. What this process would have written is dropped.
        """
        if _read(self.path).token != self.token:
            owner = holder(self.path.parent)
            raise ClaimLostError(f"{self.path.parent} was taken over by {owner or 'nobody: its claim was deleted'}")

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT):
            with suppress(OSError):  # a file system away for a moment is no reason to stop
                try:
                    self.check()
                except ClaimLostError:
                    return
                os.utime(self.path)


@contextmanager
def claim(
    folder: Path, *, token: str | None = None, dead: Collection[str] = (), node: str | None = None
) -> Iterator[Claim]:
    """Hold the run in ``folder``, with a sign of life every `BEAT` seconds until the context ends.

    Args:
        token: What tells this claim from all others; drawn at random by default.
        dead: Tokens of claims whose owners are known to have ended, which are taken over.
        node: Noted in the claim.

    Raises:
        ClaimedError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = _take(folder, token or uuid.uuid4().hex, dead, node)
    stop = threading.Event()
    beating = threading.Thread(target=mine._beat, args=(stop,), daemon=True)
    beating.start()
    try:
        yield mine
    finally:
        stop.set()
        beating.join()
        with suppress(OSError):
            if _read(mine.path).token == mine.token:
                mine.path.unlink()


def holder(folder: Path) -> Owner | None:
    """Who holds the run in ``folder``; None if nobody does."""
    numbered = _claims(folder)
    return _read(numbered[max(numbered)]) if numbered else None


class Seen(NamedTuple):
    """Who holds a run and whether that process is alive: None until one can tell."""

    owner: Owner
    alive: bool | None


class Watch:
    """Remembers when each claim was last seen to change, by the monotonic clock of this process."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float, bool]] = {}  # by token: time of the file, when it was new, ever changed

    def observe(self, folder: Path) -> Seen | None:
        """Who holds the run in ``folder``; None if nobody does."""
        numbered = _claims(folder)
        if not numbered:
            return None
        path = numbered[max(numbered)]
        owner, touched, now = _read(path), _touched(path), time.monotonic()
        if not touched:
            return None
        key = owner.token or str(path)
        before, since, changed = self._seen.get(key, (touched, now, False))
        if touched != before:
            since, changed = now, True
        self._seen[key] = (touched, since, changed)
        if owner.gone() or now - since > STALE:
            return Seen(owner, False)
        return Seen(owner, True if changed and now - since < 3 * BEAT else None)


def ended(folder: Path) -> set[str]:
    """The token of the claim on ``folder`` if its owner has ended; empty if it lives, or nobody holds the run.

    An owner on another machine, or on this one before it was started anew, is watched, for up to `STALE` seconds.
    """
    watch = Watch()
    said = False
    while (seen := watch.observe(folder)) is not None and seen.alive is None and not seen.owner.here():
        if not said:
            logging.warning("%s is held by %s: waiting up to %.0f s for a sign of life", folder, seen.owner, STALE)
            said = True
        time.sleep(BEAT)
    return {seen.owner.token} if seen is not None and seen.alive is False else set()


def _take(folder: Path, token: str, dead: Collection[str], node: str | None) -> Claim:
    numbered = _claims(folder)
    last = max(numbered, default=0)
    before = _read(numbered[last]) if numbered else None
    if before is not None and not (before.token in dead or before.gone()):
        raise ClaimedError(_taken(folder, before))
    mine = Claim(folder / f"claim-{last + 1}.json", token)
    _create(mine.path, Owner(platform.node(), os.getpid(), _now(), token, _machine(), node))
    others = _claims(folder)  # read anew by a network file system, since the folder has just changed
    others.pop(last + 1, None)
    changed = before is not None and last in others and _read(others[last]).token != before.token
    if changed or max(others, default=0) > last + 1:
        mine.path.unlink(missing_ok=True)
        raise ClaimedError(_taken(folder, holder(folder)))
    for older in others.values():
        older.unlink(missing_ok=True)
    return mine


def _create(path: Path, owner: Owner) -> None:
    try:
        file = path.open("xb")
    except FileExistsError:
        raise ClaimedError(_taken(path.parent, holder(path.parent))) from None
    try:
        with file:
            file.write((json.dumps(asdict(owner)) + "\n").encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _taken(folder: Path, owner: Owner | None) -> str:
    return f"another process is working on {folder} ({owner or 'it has just ended'}): wait for it, or stop it first"


def _claims(folder: Path) -> dict[int, Path]:
    """The claims in ``folder`` by their numbers; the highest one holds."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {int(match[1]): Path(entry.path) for entry in entries if (match := NAME.fullmatch(entry.name))}
    return {}


def _read(path: Path) -> Owner:
    """The owner in a claim; one without a token where the file is gone, or has not been written yet."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Owner(**json.loads(path.read_bytes()))
    return Owner()


def _touched(path: Path) -> int:
    """When a claim was last touched, by the clock of whoever touched it; 0 if it is gone."""
    try:
        with path.open("rb") as file:  # opening makes a network file system ask its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _machine() -> str | None:
    """What processes that can see each other's numbers have in common; None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
