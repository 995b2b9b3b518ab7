"""kill -9 at any moment: no save is lost, none is half, and a run that continues ends as if nothing had happened."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import store_checks as checks
from run_state import state
from server import Running, Server

from utils.failpoints import VARIABLE
from utils.store import Store

KILLS = int(os.environ.get("MATCHBOX_KILLS", 100))  # of runs of train.py
LANES = 2  # runs at a time
UNREAD = 255  # what multiprocessing says of a killed child whose end its fork server could not read; no code of ours
SAVE_AT = {  # passings of each failpoint in the third save: the first two pass them, too
    "save.open": (3,),
    "save.write": (33, 34, 40, 48),
    "save.fsync": (3,),
    "save.prune": (3,),
    "save.replace": (3,),
    "save.dirsync": (3,),
}


@pytest.mark.parametrize(
    ("name", "number"),
    [pytest.param(name, number, id=f"T2-{name}-{number}") for name, numbers in SAVE_AT.items() for number in numbers],
)
def test_a_kill_in_a_save(name, number, server, tmp_path, seen):
    killed = server.run("save_steps.py", tmp_path, 4, env={VARIABLE: f"{name}:{number}:SIGKILL"})
    assert killed.code == -signal.SIGKILL and "saved 2\n" in killed.out and "saved 3" not in killed.out
    assert checks.latest_step(tmp_path) >= 2 and len(checks.valid_steps(tmp_path)) >= 1
    ended = server.run("save_steps.py", tmp_path, 4)
    assert ended.code == 0 and "saved 4" in ended.out and checks.valid_steps(tmp_path) == [3, 4]
    seen("killed, the save before is there, 0 lost")


def kill_by_chance(running: Running, draw: random.Random, seconds: float) -> bool:
    """Whether the run was still there to be killed after a random part of ``seconds``."""
    running.process.join(draw.uniform(0, seconds))
    running.signal(signal.SIGKILL)
    code = running.wait().code
    assert code in (0, -signal.SIGKILL, UNREAD), running.err
    return code != 0


class Tally:
    """What several lanes count together."""

    def __init__(self, kills: int):
        self.left, self.lost, self.equal, self.runs = kills, [], 0, 0
        self.lock = threading.Lock()

    def take(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left >= 0


def lane(server: Server, arguments: list[str], project: Path, seed: int, tally: Tally, whole: dict, seconds: float):
    """Start runs, kill them by chance, continue them until they end, compare; until all kills are used."""
    draw, number, killing = random.Random(seed), 0, True
    while killing:
        number += 1
        project_here = project / f"{seed}-{number}"
        run, newest, tries = project_here / "exp", 0, 0
        while True:
            more = ["--resume", run] if list(run.glob("weights/*.safetensors")) else ["--exist-ok"]
            killing = killing and tally.take()
            running = server.start("train.py", *arguments, "--project", project_here, *more)
            if not (kill_by_chance(running, draw, seconds) if killing else running.wait().code):
                break
            assert killing or tries < 2, running.err
            tries += not killing
            if list(run.glob("weights/*.safetensors")):
                found = Store(run / "weights").latest().meta["step"]
                if found < newest:
                    tally.lost.append((newest, found))
                newest = found
            elif newest:
                tally.lost.append((newest, None))
        tally.runs += 1
        tally.equal += state(run) == whole


def test_t1_kills_by_chance(server, tiny_run, tmp_path, seen):
    """A save after every step; each lane's runs are killed and continued, and end equal to one that was left alone."""
    arguments = [*tiny_run, "--noval", "--save-interval", "0"]
    server.run("train.py", *arguments, "--project", tmp_path / "first")  # what a first run reads from the disk
    start = time.monotonic()
    assert server.run("train.py", *arguments, "--project", tmp_path / "whole").code == 0
    seconds, whole = (time.monotonic() - start) * LANES**0.5, state(tmp_path / "whole" / "exp")
    tally = Tally(KILLS)
    with ThreadPoolExecutor(LANES) as pool:
        lanes = [
            pool.submit(lane, server, arguments, tmp_path, seed, tally, whole, seconds) for seed in range(1, LANES + 1)
        ]
        for each in lanes:
            each.result()
    assert tally.lost == []
    assert tally.equal == tally.runs >= LANES
    seen(f"{KILLS} kills, 0 lost, {tally.equal} of {tally.runs} runs equal to the bit")
