"""Mistakes that somebody could make in the code, as changes of its text, each with the check that must notice it.

A suite proves something only if it fails where the code is wrong: ``test_mutants.py`` puts each mistake into a process
of its own and runs the check there.
"""

import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import store_checks as checks


class Mutant(NamedTuple):
    """A mistake: in each of these modules a text becomes another; ``check`` must fail then."""

    changes: dict[str, dict[str, str]]
    check: Callable[[Path], object]


def in_files(old: str, new: str) -> dict[str, dict[str, str]]:
    return {"utils.files": {old: new}}


def in_store(old: str, new: str) -> dict[str, dict[str, str]]:
    return {"utils.store": {old: new}}


def in_checkpoint(old: str, new: str) -> dict[str, dict[str, str]]:
    return {"utils.checkpoint": {old: new}}


OF_THE_STORE = {
    "T2-written in place": Mutant(
        {
            "utils.files": {
                'part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")': "part = path",
                "os.O_EXCL": "os.O_TRUNC",
                "        part.replace(path)\n": "",
            },
            "utils.store": {"            self._rotate()\n": ""},
        },
        checks.survives_a_kill_at_every_call,
    ),
    "T34-file not fsynced": Mutant(
        in_files("            os.fsync(file.fileno())\n", ""), checks.survives_a_power_failure
    ),
    "T34-folder not fsynced": Mutant(
        in_files("        _sync_folder(path.parent)\n", ""), checks.survives_a_power_failure
    ),
    "T35-not verified": Mutant(in_store("            _verify(part, data)\n", ""), checks.verifies_before_it_rotates),
    "T35-pruned before verified": Mutant(
        in_store("            _verify(part, data)\n", "            self._rotate()\n            _verify(part, data)\n"),
        checks.verifies_before_it_rotates,
    ),
    "T35-one kept": Mutant(in_store("self.last.replace(self.previous)", "pass"), checks.keeps_two_at_every_call),
    "W16-a damaged one takes a good one's place": Mutant(
        in_store("self.last.is_file() and _reads_well(self.last)", "True"), checks.falls_back_to_an_older_one
    ),
    "W16-newest by the clock": Mutant(
        in_store(
            "        passed_over = []\n",
            "        files.sort(key=lambda file: -file.stat().st_mtime_ns)\n        passed_over = []\n",
        ),
        checks.asks_no_clock,
    ),
    "W15-no checksum": Mutant(
        in_checkpoint("if expected != meta.get(CHECKSUM):", "if False:"), checks.notices_every_flipped_bit
    ),
    "W15-checksum of the tensors only": Mutant(
        in_checkpoint("2: _fingerprint_of_all}", "2: lambda tensors, header: fingerprint(tensors)}"),
        checks.notices_every_flipped_bit,
    ),
    "W9-pickles are loaded": Mutant(
        in_checkpoint(
            '    try:\n        with safe_open(path, framework="pt") as file:\n            header =',
            "    try:\n        if Path(path).read_bytes()[:2] == b'PK':\n"
            "            torch.load(Path(path).open('rb'), weights_only=False)\n"
            '        with safe_open(path, framework="pt") as file:\n            header =',
        ),
        checks.executes_nothing,
    ),
    "T17-nan committed": Mutant(
        in_store("        refuse_nonfinite(tensors, self.last)\n", ""), checks.commits_finite_numbers_only
    ),
    "T20-nan becomes 0 in the file": Mutant(
        in_store(
            "        refuse_nonfinite(tensors, self.last)\n",
            "        tensors = {name: tensor.nan_to_num(0, 0, 0) for name, tensor in tensors.items()}\n",
        ),
        checks.commits_finite_numbers_only,
    ),
    "T11-average in half precision": Mutant(
        in_checkpoint(
            'tensor.detach().to("cpu").contiguous()',
            '(tensor.half() if name.startswith("ema.") else tensor).detach().to("cpu").contiguous()',
        ),
        checks.keeps_every_bit,
    ),
    "T11-optimiser not saved": Mutant(
        in_checkpoint(
            "for name, tensor in tensors.items()}\n    header",
            'for name, tensor in tensors.items() if not name.startswith("optim.")}\n    header',
        ),
        checks.keeps_every_bit,
    ),
    "W19-error swallowed": Mutant(
        in_store("            return False\n", "            return True\n"), checks.outlives_a_full_disk
    ),
    "T7-goes on for ever": Mutant(in_store("if self.failures == ATTEMPTS:", "if False:"), checks.outlives_a_full_disk),
    "T7-temporary file left": Mutant(
        in_files(
            "    except OSError as error:\n        part.unlink(missing_ok=True)\n",
            "    except OSError as error:\n",
        ),
        checks.outlives_a_full_disk,
    ),
    "T7-failures add up": Mutant(
        in_store("self.failures, self.last_is_good = 0, True", "self.last_is_good = True"), checks.tries_again
    ),
    "W18-written through a link": Mutant(
        in_files("    path = Path(path)\n    part", "    path = Path(path).resolve()\n    part"), checks.replaces_links
    ),
    "W20-best rewritten in place": Mutant(
        in_store("        new.replace(path)\n", "        path.write_bytes(part.read_bytes())\n"),
        checks.never_rewrites_in_place,
    ),
    "S14-a planted file is followed": Mutant(
        in_files("os.O_CREAT | os.O_EXCL", "os.O_CREAT"), checks.writes_no_planted_file
    ),
    "T9-lock ignored": Mutant(
        {"utils.run": {"            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n": "            pass\n"}},
        checks.refuses_a_second_run,
    ),
    "T9-lock inherited by loading processes": Mutant(
        {"utils.run": {"fcntl.lockf(file": "fcntl.flock(file"}}, checks.takes_over_a_stale_lock
    ),
}


class RunMutant(NamedTuple):
    """A mistake in what continues a run, which was killed in save number ``save``; its end must differ then."""

    changes: dict[str, dict[str, str]]
    save: int


# steps 0 1 2 make epoch 0, saved after each and after the epoch: saves 1 2 3 4, then 5 6 7 8 of epoch 1, 9 .. 12 of 2
IN_AN_EPOCH, AFTER_ITS_ROW = 6, 8


def in_trainer(old: str, new: str = "pass") -> dict[str, dict[str, str]]:
    return {"utils.trainer": {old: new}}


OF_A_RUN = {
    "T11-generator not restored": RunMutant(in_trainer('torch.set_rng_state(tensors["rng.cpu"])'), IN_AN_EPOCH),
    "T11-optimiser not restored": RunMutant(
        in_trainer('checkpoint.load_optimizer_tensors(self.optimizer, part("optim"))'), IN_AN_EPOCH
    ),
    "T11-updates of the average not restored": RunMutant(
        in_trainer('self.ema.updates = counters["ema_updates"]'), IN_AN_EPOCH
    ),
    "T11-rates start again": RunMutant(in_trainer('("epoch", "step", ', '("epoch", '), IN_AN_EPOCH),
    "T11-pictures of the epoch start again": RunMutant(
        {"train": {"set_epoch(epoch, first)": "set_epoch(epoch)"}}, IN_AN_EPOCH
    ),
    "T11-losses before the kill forgotten": RunMutant(
        in_trainer("if name in counters:", 'if name in counters and name != "sums":'), IN_AN_EPOCH
    ),
    "T15-an epoch stands twice": RunMutant(
        {"utils.logger": {'if row["epoch"] < epoch]': 'if row["epoch"] <= epoch]'}}, AFTER_ITS_ROW
    ),
}


def put_in(changes: dict[str, dict[str, str]]) -> None:
    """Change the code of this process: each module runs again with its new text, and all of ours see its new parts."""
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("utils", "models", "train")]
    for name, texts in changes.items():
        module = sys.modules[name]
        source, before = inspect.getsource(module), dict(vars(module))
        for old, new in texts.items():
            assert source.count(old) == 1, f"{name} has {source.count(old)} times {old!r}: bring the mutant up to date"
            source = source.replace(old, new)
        exec(compile(source, module.__file__, "exec"), vars(module))
        renewed = {id(value): key for key, value in before.items() if callable(value)}
        for other in ours:
            for key, value in list(vars(other).items()):
                if other is not module and id(value) in renewed:
                    setattr(other, key, vars(module)[renewed[id(value)]])


def outcome(changes: dict[str, dict[str, str]], check: Callable[[], object]) -> str:
    """What ``check`` says of the changed code, in a process of its own: "" if it passes, else what fails."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "ended"
        try:
            put_in(changes)
            check()
            text = ""
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        finally:
            os.write(write, text.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text


def failure(mutant: Mutant, folder: Path) -> str:
    return outcome(mutant.changes, partial(mutant.check, folder))
