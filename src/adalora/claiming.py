"""The claim that lets one process alone write a run's folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import AdapterFileError, ConfigError
from .runfiles import BEGUN, CHECKPOINTS, FAILED

# What torchrun, accelerate and the kinds of mpirun set, and the Trainer looks at.
_WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def require_one_process() -> None:
    """Raise ConfigError if a launcher started this process as one of several, which would all write one run."""
    for name in _WORLDS:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            raise ConfigError(
                f"the environment variable {name} is {text}: a launcher such as torchrun started several processes, "
                "but a recipe trains in one process. Start it without the launcher (or unset the variable); for "
                "several processes write a loop of your own, as docs/scale.md shows."
            )


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """`out` for one run alone: a new folder, an empty one, or that of a run that failed, which is replaced, or of
    one that was killed before it began to train.

    What fails before training has begun leaves everything as it was; what fails later leaves the reason in
    FAILED.txt. Raises ConfigError if `out` is a file, or in use.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    _claim(out)
    with locked(out):
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # the disk may be full, and the error itself is what the user must see
                if (out / BEGUN).exists():
                    (out / FAILED).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
                else:
                    _empty(out)
                    for folder in made:
                        folder.rmdir()
            raise


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run in `out` against a second process, by a lock that the system drops with the process.

    What a process that was killed left half-written is removed. Raises ConfigError while another one holds the lock.
    """
    with _lock(out):
        for left in out.glob("**/.adalora-*"):  # as files.py names them
            _remove(left)
        yield


@contextmanager
def _lock(out: Path) -> Iterator[bool]:
    """Whether the lock is held: not every system has such locks."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    handle, held = os.open(out / CHECKPOINTS, os.O_RDONLY), False
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError as error:
                raise ConfigError(f"the run in {str(out)!r} is still going on, in another process.") from error
        yield held
    finally:
        os.close(handle)


def _claim(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / BEGUN).is_file():  # else a file of that name is somebody else's
            with suppress(FileNotFoundError):
                (out / FAILED).unlink()  # only one of two runs succeeds here
                _empty(out)
        if _abandoned(out):
            return  # who of several gets it, the lock decides
        if any(out.iterdir()):
            raise ConfigError(f"the output folder {str(out)!r} is not empty; choose another with --out, or remove it.")
        (out / CHECKPOINTS).mkdir()  # and here, where the folder was empty
    except (FileExistsError, NotADirectoryError) as error:
        state = "taken by another run" if out.is_dir() else "a file, or within one"
        raise ConfigError(f"the output folder {str(out)!r} is {state}; choose another with --out.") from error
    except OSError as error:
        raise AdapterFileError(
            f"cannot make the output folder {str(out)!r}: {error.strerror}; choose another with --out."
        ) from error


def _abandoned(out: Path) -> bool:
    """Whether `out` holds only what a run leaves that was killed before it began to train."""
    names = {path.name for path in out.iterdir() if not path.name.startswith(".adalora-")}
    if names != {CHECKPOINTS} or not (out / CHECKPOINTS).is_dir() or any((out / CHECKPOINTS).iterdir()):
        return False
    try:
        with _lock(out) as held:
            return held
    except ConfigError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    """A file, a folder with all in it, or a link: what it points at stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
