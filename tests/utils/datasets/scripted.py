"""Stand-ins for cv2.VideoCapture: what a file or camera sends, frame by frame, and what it says of itself."""

import threading
import time

import cv2
import numpy as np

from utils.datasets import streams
from utils.errors import UserError

SIZE = (4, 6)  # h, w of a frame


class Scripted:
    """Sends a grey frame per number of ``values`` (or the frame itself), then nothing any more.

    Args:
        slow: seconds before each frame.
        by_hand: each further frame, and the end, come when ``more.release()`` is called.
    """

    def __init__(self, values, *, promised: float = 0, fps: float = 25.0, slow: float = 0.0, by_hand: bool = False):
        self.values, self.slow, self.by_hand = iter(values), slow, by_hand
        self.says = {cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_FRAME_COUNT: promised}
        self.released, self.more = False, threading.Semaphore(1)

    def get(self, key: int) -> float:
        return self.says[key]

    def grab(self) -> bool:
        time.sleep(self.slow)
        if self.by_hand:
            self.more.acquire(timeout=20)
        self.value = next(self.values, None)
        return self.value is not None

    def retrieve(self):
        value = self.value
        return True, np.full((*SIZE, 3), value % 256, np.uint8) if isinstance(value, int) else value

    def read(self):
        return self.retrieve() if self.grab() else (False, None)

    def release(self) -> None:
        self.released = True


def opened_by(monkeypatch, scripts: dict) -> list:
    """Make streams open these captures, by address, one after the other; None and what is missing do not open.

    Returns the addresses that were asked for, in order.
    """
    asked = []
    waiting = {address: list(captures) for address, captures in scripts.items()}

    def open_capture(address, name):
        asked.append(address)
        capture = waiting[address].pop(0) if waiting.get(address) else None
        if capture is None:
            raise UserError(name, "the stream does not open")
        return capture

    monkeypatch.setattr(streams, "open_capture", open_capture)
    return asked


def frames_of(source) -> list[int]:
    """The numbers that frames show."""
    return [int(frame.image.mean()) for frame in source]
