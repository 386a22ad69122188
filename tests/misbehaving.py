"""Work for the processes of inference.py that does to them what the name of a picture says."""

import os
import signal
import sys
import time

import inference

PREPARE = inference.prepare


def prepare_all(paths: list[str], side: int, thumbnails: bool) -> list[inference.Result]:
    """Read pictures as inference.py does, with the misbehaving decoder."""
    inference.prepare = prepare
    return inference.prepare_all(paths, side, thumbnails)


def prepare(path: str, side: int) -> object:
    """Read a picture, or kill, leave, hang or bloat the process."""
    name = os.path.basename(path)
    if name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif name.startswith("leave"):
        os._exit(3)
    elif name.startswith("hang"):
        time.sleep(1000)
    elif name.startswith("bloat"):
        bytearray(8 * 2**30)
    elif name.startswith("odd"):
        raise KeyError("new\nline")
    elif name.startswith("torch") and "torch" in sys.modules:
        raise ValueError("torch is imported here")
    return PREPARE(path, side)


def never_start() -> None:
    """Die before the first picture."""
    os._exit(7)
