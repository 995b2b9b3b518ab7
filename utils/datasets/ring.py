"""Memory that processes write batches into and the program reads them from, used again and again.

A batch that travels through torch's own shared memory is copied there, into pages that the system has to clear and to
map in both processes: more work than to make an augmented sample from a cache. Here a process writes pictures straight
into a slot, and what it sends is the slot's number. Every process has slots of its own, so nobody waits for a lock.
"""

import itertools
import math
import mmap
import os
import weakref
from collections.abc import Callable

import numpy as np
import torch

from utils.structures import Batch

RINGS: "weakref.WeakValueDictionary[int, Ring]" = weakref.WeakValueDictionary()  # how a batch finds its memory
NUMBERS = itertools.count()


class Ring:
    """Slots for the pictures of batches, made before the processes are forked that share it.

    Args:
        processes: how many write.
        slots: of each: batches on their way and in use. Where all are taken, a batch travels as it would without.
        slot_bytes: of the largest batch. Memory is taken when a slot is first written.
    """

    def __init__(self, processes: int, slots: int, slot_bytes: int):
        self.slots, self.owner, self.number = slots, os.getpid(), next(NUMBERS)
        self.memory = np.frombuffer(mmap.mmap(-1, processes * slots * slot_bytes), np.uint8)
        self.memory = self.memory.reshape(processes * slots, slot_bytes)
        self.taken = np.frombuffer(mmap.mmap(-1, processes * slots), np.uint8)
        RINGS[self.number] = self

    def make(self, process: int, make_batch: Callable) -> "Sent | object":
        """In a process: ``make_batch(allocate)``, its pictures in a slot of the process if one is free and fits."""
        lent = []

        def allocate(shape: tuple[int, ...], dtype: type) -> np.ndarray:
            free = np.flatnonzero(self.taken[process * self.slots :][: self.slots] == 0)
            if not len(free) or math.prod(shape) > self.memory.shape[1]:
                return np.empty(shape, dtype)
            lent.append(process * self.slots + int(free[0]))
            self.taken[lent] = 1
            return self._pictures(lent[0], shape)

        sent = False
        try:
            batch = make_batch(allocate)
            sent = bool(lent) and isinstance(batch, Batch)
            return Sent(self.number, lent[0], batch) if sent else batch
        finally:
            if lent and not sent:
                self.taken[lent] = 0

    def receive(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        """In the program: the pictures in a slot, which is free again when nobody holds them any more."""
        pictures = self._pictures(slot, shape)
        weakref.finalize(pictures, _free, self.taken, slot, self.owner).atexit = False
        return pictures

    def _pictures(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.memory[slot, : math.prod(shape)].reshape(shape)


def _free(taken: np.ndarray, slot: int, owner: int) -> None:
    if os.getpid() == owner:  # a process that was forked meanwhile has copies of all that the program held
        taken[slot] = 0


class Sent:
    """A batch on its way: unpickled it is a Batch again."""

    def __init__(self, ring: int, slot: int, batch: Batch):
        self.ring, self.slot, self.batch = ring, slot, batch

    def __reduce__(self):
        images = self.batch.images.permute(0, 2, 3, 1)
        return _arrived, (self.ring, self.slot, tuple(images.shape), self.batch.targets, self.batch.infos)


def _arrived(ring: int, slot: int, shape: tuple[int, ...], targets, infos) -> Batch:
    images = torch.from_numpy(RINGS[ring].receive(slot, shape)).permute(0, 3, 1, 2)
    return Batch(images=images, targets=targets, infos=infos)
