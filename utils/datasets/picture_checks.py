"""What is wrong with the pictures of a data set, and what its reader noticed: one function per question."""

from collections.abc import Iterator
from pathlib import Path

from utils.datasets.findings import ERROR, NOTE, WARNING, Exam, Finding, Place, Shown
from utils.datasets.formats.rows import DROPPED, KEPT, QUARANTINED, Problem
from utils.datasets.limits import LIMITS
from utils.datasets.lookalikes import Look, groups, same_pictures
from utils.datasets.quarantine import refuse_bad
from utils.errors import QuarantineError, UserError
from utils.structures import Record

NAMED = 3  # members of a group beside its first
SUFFIXES = {  # of formats whose name is not their only one
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}


def reader_problems(exam: Exam) -> Iterator[Finding]:
    """What the reader noticed, by kind."""
    for data in exam.sets:
        try:
            refuse_bad(data, LIMITS.max_bad)
        except QuarantineError as error:
            yield Finding(severity=ERROR, title=f"{data.split}: {error.message}", advice=error.hint)
        kinds: dict[tuple[str, str], list[Problem]] = {}
        for problem in data.problems:
            kinds.setdefault((problem.reason, problem.action), []).append(problem)
        by_path = {record.path: record for record in data.records}
        for (reason, action), problems in kinds.items():
            places = []
            for problem in problems:
                record = by_path.get(problem.path)
                places.append(Place(problem.where, problem.found, () if record is None else (Shown(record),)))
            severity = WARNING if action in (DROPPED, QUARANTINED) else NOTE
            told = reason if action == KEPT else f"{reason} ({action})"
            yield Finding(severity=severity, title=f"{data.split}: {told}", places=tuple(places))


def unreadable(exam: Exam) -> Iterator[Finding]:
    """Pictures with a good header that do not decode."""
    bad = [(path, look) for path, look in exam.looks.items() if isinstance(look, UserError)]
    if bad:
        places = tuple(Place(path, error.message) for path, error in bad)
        yield Finding(severity=ERROR, title="pictures that do not decode", places=places, advice="copy them again")


def other_suffix(exam: Exam) -> Iterator[Finding]:
    """Pictures that are not what their name says."""
    places = []
    for _, record in exam.records():
        look, suffix = exam.looks[record.path], Path(record.path).suffix.lower()
        if isinstance(look, Look) and suffix not in _suffixes(look.header.format):
            places.append(Place(record.path, f"is a {look.header.format}", (Shown(record),)))
    if places:
        advice = "read all the same; other programs may go by the name"
        title = "pictures of another format than their name says"
        yield Finding(severity=NOTE, title=title, places=tuple(places), advice=advice)


def _suffixes(format: str) -> tuple[str, ...]:
    return SUFFIXES.get(format, (f".{format.lower()}",))


def turned(exam: Exam) -> Iterator[Finding]:
    """Pictures that EXIF turns: were they labelled upright?"""
    places = tuple(
        Place(record.path, f"orientation {look.header.orientation}", (Shown(record),))
        for _, record in exam.records()
        if isinstance(look := exam.looks[record.path], Look) and look.header.turned
    )
    if places:
        advice = "look whether their boxes lie on the objects; some tools label the picture as it is stored"
        yield Finding(severity=WARNING, title="pictures turned upright by their EXIF", places=places, advice=advice)


def alike(exam: Exam) -> Iterator[Finding]:
    """Pictures that show the same, in one split or in two."""
    entries = [(data.split, record) for data, record in exam.records() if isinstance(exam.looks[record.path], Look)]
    pairs = same_pictures([exam.looks[record.path] for _, record in entries])
    leaks = [[entries[i], entries[k]] for i, k in pairs if entries[i][0] != entries[k][0]]
    inside = groups([(i, k) for i, k in pairs if entries[i][0] == entries[k][0]])
    if leaks:
        yield Finding(
            severity=ERROR,
            title="pictures that show the same in two splits",
            places=tuple(_same(members, exam) for members in leaks),
            advice="take them out of one: what is measured on pictures that were learnt says nothing",
        )
    if inside:
        yield Finding(
            severity=WARNING,
            title="groups of pictures that show the same within a split",
            places=tuple(_same([entries[number] for number in members], exam) for members in inside),
            advice="frames of a film and copies count more than other pictures; keep one of each group",
        )


def _same(members: list[tuple[str, Record]], exam: Exam) -> Place:
    digests = {exam.looks[record.path].digest for _, record in members}
    labels = {tuple(sorted(record.labels.tolist())) for _, record in members}
    how = "the same bytes" if len(digests) == 1 else "nearly the same"
    others = "  ".join(f"[{split}] {record.path}" for split, record in members[1 : 1 + NAMED])
    others += f" and {len(members) - 1 - NAMED} more" * (len(members) - 1 > NAMED)
    told = f"{how} as {others}" + ", labelled otherwise" * (len(labels) > 1)
    return Place(f"[{members[0][0]}] {members[0][1].path}", told, tuple(Shown(record) for _, record in members))
