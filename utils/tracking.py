"""Objects keep a number from frame to frame: ByteTrack (Zhang et al., 2022) of the library ``trackers`` (Apache-2.0).

The library is no part of Matchbox's requirements. It is imported when a ``Tracker`` is made.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from utils.datasets.capture import Frame
from utils.errors import UserError
from utils.structures import Detections

SURE = 0.5  # least score with which an object begins; it is followed with any
STILLS_FPS = 30.0  # pictures of a folder are taken for frames of one film


class Tracker:
    """``tracker(frame, detections) -> detections`` with ``ids``; each video and each stream counts for itself, from 1.

    An object has its number from the second frame on in which it is found, and keeps it for a second without being
    found. ``totals`` counts objects by their first label.

    Raises:
        UserError: the library is not installed.
    """

    def __init__(self):
        self._new = _byte_track()
        self._sequences: dict[str, object] = {}
        self._highest: Counter[str] = Counter()
        self.totals: Counter[int] = Counter()

    def __call__(self, frame: Frame, detections: Detections) -> Detections:
        name = frame.path if frame.fps else ""
        if name not in self._sequences:
            self._sequences[name] = self._new(frame.fps or STILLS_FPS)
        ids = self._sequences[name](detections, frame.arrived)
        for number, label in zip(ids.tolist(), detections.labels.tolist()):
            if number > self._highest[name]:
                self.totals[label] += 1
        self._highest[name] = max([self._highest[name], *ids.tolist()])
        return replace(detections, ids=ids)


def _byte_track() -> Callable[[float], Callable[[Detections, float | None], torch.Tensor]]:
    """frames per second -> (detections, seconds or None: one frame later) -> ids int64 [n], 0 where there is none."""
    try:
        from supervision import Detections as Found
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise UserError("--track", f"needs the package trackers: {error}", "pip install trackers") from error

    def sequence(fps: float):
        tracker = ByteTrackTracker(frame_rate=fps, track_activation_threshold=SURE, high_conf_det_threshold=SURE)

        def update(detections: Detections, seconds: float | None) -> torch.Tensor:
            num = len(detections)
            found = Found(
                xyxy=detections.boxes.double().numpy().reshape(-1, 4),
                confidence=detections.scores.double().numpy(),
                class_id=detections.labels.numpy(),
                data={"row": np.arange(num)},
            )
            ids = torch.zeros(num, dtype=torch.int64)
            tracked = tracker.update(found, timestamp=seconds)
            if len(tracked):  # in an order of its own
                ids[torch.from_numpy(tracked.data["row"])] = torch.from_numpy(tracked.tracker_id).long() + 1
            return ids

        return update

    return sequence
