"""Cameras and streams: the newest frame of each, for as long as it lives.

A thread per stream reads all that comes and keeps one frame: who is slow gets the newest one, never a queue, and what
was replaced is counted. A stream that is lost is opened again, 1, 2, 4, ... 30 s apart; meanwhile it has no frames, and
the others go on.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from utils.datasets.capture import Frame, frame_rate, open_capture, quiet_opencv, to_channels, without_password
from utils.errors import ResourceError, UserError

RETRIES = 5  # tries to open a stream again: half a minute
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before the next try
PATIENCE = 1.0  # seconds that a thread gets to end; one that waits for a dead stream is left alone
LATENCIES = 1000  # the last ones count


def is_live(text: str) -> bool:
    """Whether this is a camera number or a stream address. (``file://`` is neither.)"""
    return text.isdecimal() or ("://" in text and not text.startswith("file://"))


@dataclass
class Stream:
    """One camera or stream: its newest frame, and what happened to it. Its thread and the reader share it."""

    address: str | int
    name: str
    newest: Frame | None = None
    num_frames: int = 0  # that came
    num_waiting: int = 0  # of these, since the reader took one
    num_dropped: int = 0
    last: float = 0.0  # when the last frame came
    num_gaps: int = 0  # times it came back
    gap: float = 0.0  # seconds of these together
    lost: str = ""  # why it was given up
    latencies: deque = field(default_factory=lambda: deque(maxlen=LATENCIES))  # seconds from arrival to result

    def summary(self) -> str:
        """What came, what was not looked at, how late results were."""
        parts = [f"{self.num_frames} frames came, {self.num_dropped} dropped for newer ones"]
        if self.latencies:
            middle, longest = statistics.median(self.latencies), max(self.latencies)
            parts.append(f"latency {1000 * middle:.0f} ms (at most {1000 * longest:.0f})")
        if self.num_gaps:
            parts.append(f"lost {self.num_gaps} times, {self.gap:.1f} s together")
        return f"{self.name}: {', '.join(parts)}"


class Streams:
    """An iterable of frames: the newest of each stream, in turn, until all are lost or ``close()``.

    Args:
        addresses: camera numbers and ``rtsp://``, ``http://``, ... addresses, as typed.
        channels: 3 (RGB) or 1 (grey).
        stride: keep every stride-th frame.
        retries: tries to open a stream again before it is given up; frames in between start the count anew.
        say: gets a line when a stream is lost and when it is back.
    """

    def __init__(
        self,
        addresses: list[str],
        *,
        channels: int = 3,
        stride: int = 1,
        retries: int = RETRIES,
        say: Callable[[str], object] = print,
    ):
        self.channels, self.stride, self.retries, self.say = channels, stride, retries, say
        names = [f"camera {text}" if text.isdecimal() else without_password(text) for text in addresses]
        self.streams = [
            Stream(int(text) if text.isdecimal() else text, name if name not in names[:n] else f"{name} #{n + 1}")
            for n, (text, name) in enumerate(zip(addresses, names))  # two passwords can hide behind one name
        ]
        self._changed, self._closed = threading.Condition(), threading.Event()
        self._failure: BaseException | None = None  # a bug of ours, in a thread
        self._threads = [threading.Thread(target=self._run, args=(s,), daemon=True) for s in self.streams]
        self._quiet = ExitStack()

    def __iter__(self) -> Iterator[Frame]:
        self._quiet.enter_context(quiet_opencv())
        for thread in self._threads:
            thread.start()
        turn = list(self.streams)
        while (stream := self._wait(turn)) is not None:
            turn.append(turn.pop(turn.index(stream)))
            yield self._take(stream)

    def finished(self, frame: Frame) -> str:
        """To be called when the results of a frame are there; returns its latency in words."""
        stream = next(stream for stream in self.streams if stream.name == frame.path)
        stream.latencies.append(time.monotonic() - frame.arrived)
        return f"latency {1000 * stream.latencies[-1]:.0f} ms"

    def close(self) -> None:
        """End the threads, soon; whoever waits for a frame waits no longer."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(PATIENCE)
        self._quiet.close()

    @property
    def problems(self) -> list[str]:
        return [f"{stream.name}: {stream.lost}" for stream in self.streams if stream.lost]

    def refuse_lost(self, where: str) -> None:
        """Raises ResourceError if no stream is left, UserError if none was ever there."""
        if all(stream.lost for stream in self.streams):
            came = any(stream.num_frames for stream in self.streams)
            lost = self.streams[0].lost if len(self.streams) == 1 else f"all {len(self.streams)} streams are lost"
            raise (ResourceError if came else UserError)(where, lost, "see --retries")

    # ------------------------------------------------------------------------------------------------- the reader

    def _wait(self, turn: list[Stream]) -> Stream | None:
        """The next stream with a frame, in turn; None: there will be no more."""

        def ready() -> Stream | None:
            return next((stream for stream in turn if stream.newest), None)

        def settled() -> bool:
            return bool(ready() or self._failure or self._closed.is_set() or all(s.lost for s in turn))

        with self._changed:
            self._changed.wait_for(settled)
            if self._failure:
                raise self._failure
            return None if self._closed.is_set() else ready()

    def _take(self, stream: Stream) -> Frame:
        with self._changed:
            frame, stream.newest, stream.num_waiting = stream.newest, None, 0
            return frame

    # ------------------------------------------------------------------------------------------------- a thread

    def _run(self, stream: Stream) -> None:
        try:
            self._follow(stream)
        except BaseException as error:  # raised again where the frames are read
            self._failure = error
        finally:
            with self._changed:
                self._changed.notify_all()

    def _follow(self, stream: Stream) -> None:
        """Read a stream until it is given up or nobody wants it any more."""
        failures = 0
        while not self._closed.is_set():
            known = stream.num_frames
            reason = self._read(stream)
            failures = 1 if stream.num_frames > known else failures + 1
            if failures > self.retries:
                stream.lost = (
                    f"{reason}; given up at {_clock()} after {stream.num_frames} frames, {self.retries} retries"
                )
                if len(self.streams) > 1:
                    self.say(f"{stream.name}: {stream.lost}")
                return
            if not self._closed.is_set():
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1))
                self.say(f"{_clock()} {stream.name}: {reason}; try {failures} of {self.retries} in {wait:g} s")
                self._closed.wait(wait)

    def _read(self, stream: Stream) -> str:
        """Frames until there are no more; returns why."""
        try:
            capture = open_capture(stream.address, stream.name)
        except UserError as error:
            return error.message
        opened = stream.num_frames
        try:
            fps = frame_rate(capture) / self.stride
            while not self._closed.is_set():
                read, image = capture.read()
                if not read:
                    break
                now = time.monotonic()
                if opened == stream.num_frames > 0:
                    gap = now - stream.last
                    stream.num_gaps, stream.gap = stream.num_gaps + 1, stream.gap + gap
                    self.say(f"{_clock()} {stream.name}: back after {gap:.1f} s without a frame")
                stream.last = now
                if stream.num_frames % self.stride == 0:
                    self._keep(stream, to_channels(image, self.channels), fps)
                stream.num_frames += 1
        finally:
            capture.release()
        return "no frame comes any more" if stream.num_frames > opened else "opens, but sends no frame"

    def _keep(self, stream: Stream, image, fps: float) -> None:
        """Put a frame in the place of the one before."""
        with self._changed:
            if stream.newest:
                stream.num_dropped += 1
                stream.num_waiting += 1
            stream.newest = Frame(
                image=image,
                path=stream.name,
                number=stream.num_frames,
                fps=fps,
                num_dropped=stream.num_waiting,
                arrived=stream.last,
            )
            self._changed.notify_all()


def _clock() -> str:
    return time.strftime("%H:%M:%S")
