"""Pictures that break while a run is under way: who takes their place, and when it is enough."""

from types import SimpleNamespace

import pytest

from utils.datasets.dataset import DetectionDataset
from utils.datasets.formats.rows import DROPPED, Problem
from utils.datasets.images import ImageError
from utils.datasets.quarantine import FILE, Quarantine, extend_quarantine, write_quarantine
from utils.errors import QuarantineError

BROKEN = ImageError("picture.jpg", "cannot be read")


def quarantine(num=20, **options) -> Quarantine:
    return Quarantine(num, **{"seed": 0, "max_bad": 0.5, **options})


@pytest.mark.parametrize("seed", range(8))
def test_who_takes_the_place_does_not_depend_on_what_is_known(seed):
    """Another worker may have found the first substitute to be broken, or not yet: the sample is the same."""

    def load(index, max_side):
        if index in broken:
            raise BROKEN
        return index

    first = quarantine(seed=seed)
    first.bad[3] = True
    broken = {3, first.substitute(3)}
    informed, fresh = quarantine(seed=seed), quarantine(seed=seed)
    informed.bad[list(broken)] = True
    chosen = [
        DetectionDataset._load_or_replace(SimpleNamespace(quarantine=each, load=load), 3, 64)
        for each in (fresh, first, informed)
    ]
    assert len(set(chosen)) == 1 and chosen[0] not in broken


def test_the_last_good_picture_must_not_go():
    """Whatever is allowed: nothing could take its place, and looking for it would never end."""
    bad = quarantine(2, max_bad=1.0)
    bad.add(0, BROKEN)
    with pytest.raises(QuarantineError, match="2 of 2 pictures"):
        bad.add(1, BROKEN)


def test_a_full_disk_costs_the_line_not_the_run(tmp_path, capsys):
    bad = quarantine()
    bad.folder = tmp_path / "vanished"
    bad.add(1, BROKEN)
    assert bad.bad[1] and f"{FILE}: cannot write: No such file" in capsys.readouterr().err


def test_a_run_that_continues_keeps_what_it_listed(tmp_path, capsys):
    """Pictures that vanished while it was under way stand after those of the data set; each line once."""
    first, second, late = (Problem(f"{name}.txt", 1, "bad row", "x", DROPPED) for name in "abc")
    write_quarantine(tmp_path, [first])
    bad = quarantine()
    bad.folder = tmp_path
    bad.add(1, BROKEN)
    lines = (tmp_path / FILE).read_text().splitlines()
    extend_quarantine(tmp_path, [first, second])
    assert (tmp_path / FILE).read_text().splitlines()[:2] == lines and len(lines) == 2
    with (tmp_path / FILE).open("a") as file:
        file.write('{"path": "cut sho')  # killed while it wrote
    extend_quarantine(tmp_path, [late])
    names = [line.partition(", ")[0] for line in (tmp_path / FILE).read_text().splitlines()]
    assert [name[10:].strip('"') for name in names] == ["a.txt", BROKEN.where, "b.txt", "cut sho", "c.txt"]
    write_quarantine(tmp_path, [late])
    assert len((tmp_path / FILE).read_text().splitlines()) == 1


def test_a_run_that_continues_without_problems_lists_none(tmp_path):
    extend_quarantine(tmp_path, [])
    assert not (tmp_path / FILE).exists()
