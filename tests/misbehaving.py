"""Work for the processes of inference.py that does to them what the name of a picture says."""

import os
import signal
import sys
import time

import inference

PREPARE = inference.prepare


def prepare_all(paths: list[str], *others: object) -> list[inference.Result]:
    """Read pictures as inference.py does, with the misbehaving decoder."""
    inference.prepare = prepare
    return inference.prepare_all(paths, *others)


def prepare(path: str, side: int) -> object:
    """Read a picture, or kill, leave, hang, slow or bloat the process."""
    match os.path.basename(path).partition(".")[0]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            os._exit(3)
        case "hang":
            time.sleep(1000)
        case "slow":
            open(path + ".once", "x").close()  # fails the second time
            time.sleep(0.1)
        case "bloat":
            bytearray(8 * 2**30)
        case "odd":
            raise KeyError("new\nline")
        case "torch" if "torch" in sys.modules:
            raise ValueError("torch is imported here")
    return PREPARE(path, side)
