"""A worker for inference.py whose decoder does to it what the name of a picture says."""

import os
import signal
import time

import inference

WORK, LOAD = inference.work, inference.load


def work(connection, thumbnails: bool) -> None:
    """Serve as inference.work does, with the misbehaving decoder."""
    inference.load = load
    WORK(connection, thumbnails)


def load(path: str):
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
    elif name.startswith("garble"):
        os.write(3, b"nonsense")  # some descriptor of the worker's, its pipe perhaps
        os._exit(0)
    elif name.startswith("slow"):
        time.sleep(0.1)
    return LOAD(path)


def never_start(connection, thumbnails: bool) -> None:
    """Die before the first picture."""
    os._exit(7)


def lie(connection, thumbnails: bool, answer: tuple[bytes, ...]) -> None:
    """Answer whatever is asked with the same."""
    connection.send_bytes(b"ready")
    connection.recv_bytes()
    for part in answer:
        connection.send_bytes(part)
    time.sleep(1000)
