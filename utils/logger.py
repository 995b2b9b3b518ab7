"""One voice for a run: the console, ``results.csv``, ``log.jsonl`` and TensorBoard. Decoration cannot stop it."""

import csv
import io
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import ResourceError, UserError
from utils.failpoints import failpoint
from utils.files import atomic_write, read_bytes, write_text

WIDTH = 10  # of a console column
LOG = "log.jsonl"
TIMES = "time/"  # what a clock says


class Logger:
    """Logs a run into ``folder``; with ``folder=None`` (all processes but the first) it says and writes nothing.

    The rows of all epochs are kept and both files are replaced in one piece after each: no line is ever torn, and a
    resumed run continues after the checkpoint's last epoch, whatever came after it. Wall times (``time/...``) are not
    in ``results.csv``: it is the same whenever, and however often interrupted, a run is made again.

    Raises:
        UserError: the rows of the run that continues cannot be read.
    """

    def __init__(self, folder: Path | None, *, start_epoch: int = 0):
        self.folder, self.rows, self.warned = folder, [], set()
        self.is_behind = False  # the last rows could not be written
        self.header = ""
        self.tensorboard = None
        if folder is None:
            return
        if (folder / LOG).is_file() and start_epoch:
            self.rows = read_rows(folder / LOG)
        self.rewind(start_epoch)
        with self.guard("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and may be missing or broken

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_epoch or None)

    def rewind(self, epoch: int) -> None:
        """Forget the rows of this epoch and later ones: they will be made again."""
        self.rows = [row for row in self.rows if row["epoch"] < epoch]

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Decoration may fail: say so once and go on. Everything a run's result depends on stays outside."""
        try:
            yield
        except Exception as error:
            if what not in self.warned:
                self.warned.add(what)
                self.say(f"warning: {what} failed and is left out from here on: {type(error).__name__}: {error}")

    def say(self, text: str = "") -> None:
        """A line on the console, above a running progress bar."""
        if self.folder is not None:
            tqdm.write(text)
            sys.stdout.flush()

    @property
    def watched(self) -> bool:
        """Whether a person sees this process's progress bars."""
        return self.folder is not None and sys.stderr.isatty()

    def bar(self, title: str, total: int) -> "Bar":
        """A progress bar over the batches of an epoch; silent where nobody watches a terminal."""
        return Bar(desc=title, total=total, unit="batch", leave=False, disable=not self.watched, dynamic_ncols=True)

    def epoch(self, row: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """One epoch's numbers to every place, ``epoch`` (from 0) among them. Keys read ``group/name``.

        ``details`` go to the files and TensorBoard only: a console line has room for about a dozen.
        """
        if self.folder is None:
            return
        self._console(row)
        row = finite_or_none({**row, **details})
        self.rows.append(row)
        try:
            write_rows(self.folder, self.rows)
            self.is_behind = False
        except ResourceError as error:
            self.is_behind = True
            self.say(f"warning: {error}: this epoch's row will be written with the next one's")
        with self.guard("TensorBoard"):
            for name, value in row.items():
                if self.tensorboard is not None and isinstance(value, (int, float)) and name != "epoch":
                    self.tensorboard.add_scalar(name, value, row["epoch"])
            self.flush()

    def _console(self, row: Mapping[str, Any]) -> None:
        header = "".join(name.rpartition("/")[2][: WIDTH - 1].rjust(WIDTH) for name in row)
        if header != self.header:
            self.say(header)
            self.header = header
        self.say("".join(_cell(value).rjust(WIDTH) for value in row.values()))

    def picture(self, name: str, image: np.ndarray, epoch: int) -> None:
        """An RGB uint8 [H, W, 3] picture."""
        with self.guard("TensorBoard"):
            if self.tensorboard is not None:
                self.tensorboard.add_image(name, image, epoch, dataformats="HWC")

    def curves(self, values: Mapping[str, float], epoch: int) -> None:
        """Numbers of an epoch for TensorBoard alone."""
        with self.guard("TensorBoard"):
            for name, value in values.items():
                if self.tensorboard is not None:
                    self.tensorboard.add_scalar(name, value, epoch)

    def graph(self, model: nn.Module, images: Tensor) -> None:
        """The network as a picture of its operations, traced on ``images`` (float)."""
        with self.guard("the TensorBoard graph"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is only for the picture; that shapes become constants is fine
            if self.tensorboard is not None:
                self.tensorboard.add_graph(model, images, verbose=False)

    def flush(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.flush()

    def close(self) -> None:
        """Raises ResourceError where the rows cannot be written to the end."""
        if self.is_behind:
            write_rows(self.folder, self.rows)
        with self.guard("TensorBoard"):
            if self.tensorboard is not None:
                self.tensorboard.close()


class Bar(tqdm):
    """A progress bar with the losses so far beside it."""

    def show(self, done: int, means: Mapping[str, float]) -> None:
        self.set_postfix({name: f"{mean:.3g}" for name, mean in means.items()}, refresh=False)
        self.update(done - self.n)


def finite_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same, mappings in it too, with None, which every format has a word for, in place of what is not finite."""
    return {name: _or_none(value) for name, value in values.items()}


def _or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite_or_none(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3g}"
    return str(value)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``log.jsonl``. Raises UserError with the line that is none."""
    lines = read_bytes(path, "the log of a run").split(b"\n")
    return [_read_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]


def _read_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if type(row["epoch"]) is int:
            return row
        problem = f"epoch is {row['epoch']!r}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = str(error)
    raise UserError(where, f"not the row of an epoch: {problem}"[:200], "without the file a run goes on from here")


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """``log.jsonl`` and ``results.csv`` from all rows; a number an epoch has not is an empty cell."""
    write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in rows))
    columns = list(dict.fromkeys(name for row in rows for name in row if not name.startswith(TIMES)))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    with atomic_write(folder / "results.csv") as file:
        failpoint("csv.append")
        file.write(text.getvalue().encode("utf-8"))
