"""train.py, but the second process kills itself in its fifth step, once: the file named by KILLED_ONCE says so."""

import os
import signal
from pathlib import Path

import train
from utils.errors import run_main
from utils.trainer import Trainer

step = Trainer._take_step


def disturbed(self, *args):
    once = Path(os.environ["KILLED_ONCE"])
    if self.step == 4 and os.environ["RANK"] == "1" and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *args)


if __name__ == "__main__":
    Trainer._take_step = disturbed
    run_main(train.main)
