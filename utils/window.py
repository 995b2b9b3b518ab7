"""A window that shows pictures while a program runs."""

import os
import sys

import cv2
import numpy as np

from utils.errors import UserError

QUIT_KEYS = {ord("q"), 27}  # 27: Escape


class Window:
    """Shows one RGB picture after the other. Raises UserError where there is no screen (OpenCV would abort)."""

    def __init__(self, title: str = "Matchbox"):
        self.title = title
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("--view-img", "there is no screen", "leave it out; drawn pictures are saved")

    def show(self, image: np.ndarray) -> bool:
        """False if the user wants to stop."""
        cv2.imshow(self.title, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        return cv2.waitKey(1) & 0xFF not in QUIT_KEYS
