"""All problems of a cfg in one pass, and what each of its layers makes. Imports no torch.

python -m models.lint cfg/yolov3.cfg
python -m models.lint my.cfg --fix                  # writes my.fixed.cfg
python -m models.lint my.cfg --classes 3 -o new.cfg
python -m models.lint my.cfg --anchors data.yaml    # with --fix or -o: written, with the classes of the data
"""

import argparse
import sys
from pathlib import Path

from models.cfg import Cfg, adapt_classes, read_cfg
from models.graph import Graph, build_graph
from models.section import Problem, raise_errors
from utils.errors import UserError, run_main
from utils.files import write_text

MAX_PASSES = 8  # a corrected line can uncover the next problem of the same line


def problems_of(cfg: Cfg) -> list[Problem]:
    """Everything that is wrong with the text and with the network it describes, by line."""
    return sorted([*cfg.problems, *build_graph(cfg, strict=False).problems], key=lambda problem: problem.line)


def fix(cfg: Cfg) -> tuple[Cfg, list[Problem]]:
    """Correct every line whose correction is beyond doubt; returns the new cfg and the problems that were corrected."""
    corrected = []
    for _ in range(MAX_PASSES):
        fixable = {problem.line: problem for problem in reversed(problems_of(cfg)) if problem.fix is not None}
        if not fixable:
            break
        corrected += reversed(fixable.values())
        cfg = cfg.with_lines({line: problem.fix for line, problem in fixable.items()})
    return cfg, corrected


def table(graph: Graph) -> str:
    """One line per layer and the totals; sizes are channels x height x width."""
    rows = [("layer", "section", "size", "input", "output", "parameters", "BFLOPs")]
    for index, section in enumerate(graph.cfg.layers):
        spec = graph.layers[index]
        if spec is None:
            rows.append((str(index), section.type, "", "", "?", "", ""))
            continue
        reads = " ".join(str(source) if source != index - 1 else _show(spec.in_shapes[0]) for source in spec.inputs)
        params = f"{spec.params:,}" if spec.params else ""
        rows.append(
            (str(index), section.type, _window(section), reads, _show(spec.shape), params, _billions(spec.flops))
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligns = (str.rjust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
    lines = ["  ".join(align(cell, width) for align, cell, width in zip(aligns, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, totals(graph)])


def totals(graph: Graph) -> str:
    """Input size, parameters, FLOPs, size of the ``.weights`` file and the strides of the heads, in one line."""
    specs = [spec for spec in graph.layers if spec]
    params, floats, flops = (sum(getattr(spec, name) for spec in specs) for name in ("params", "floats", "flops"))
    text = f"{graph.width}x{graph.height}: {params:,} parameters, {flops / 1e9:.3f} BFLOPs, "
    text += f"{20 + 4 * floats:,} bytes of weights"
    if None in graph.layers:
        return f"{text}, layers marked ? not counted"
    if graph.heads:
        text += f", heads at strides {', '.join(map(str, graph.strides))}"
    return text


def report(problems: list[Problem]) -> str:
    """Aligned lines: where, how bad, what, and the cure."""
    wheres = [f"{problem.path}:{problem.line}:" for problem in problems]
    width = max(map(len, wheres), default=0)
    hints = [f" ({problem.hint})" if problem.hint else "" for problem in problems]
    return "\n".join(f"{w:{width}} {p.severity:7} {p.message}{hint}" for w, p, hint in zip(wheres, problems, hints))


def _show(shape) -> str:
    return "x".join(map(str, shape))


def _billions(flops: int) -> str:
    return f"{flops / 1e9:.3f}" if flops else ""


def _window(section) -> str:
    """``3x3/2`` where the section has a window, ``/2`` where it has a stride only."""
    size = section.int("size", 1) if section.type == "convolutional" else section.int("size", section.int("stride", 0))
    stride = section.int("stride", 1)
    if section.type in ("upsample", "reorg", "reorg3d"):
        return f"/{stride if 'stride' in section else 2}"
    return f"{size}x{size}/{stride}" if section.type in ("convolutional", "maxpool", "local_avgpool") else ""


def lint(path: Path, classes: int | None, anchors: str | None, write: Path | None, quiet: bool) -> bool:
    """Report on one file, write its corrected text where asked; True where no error is left."""
    cfg = read_cfg(path, strict=False)
    problems = problems_of(cfg)
    if problems:
        print(report(problems))
    if write is not None:
        cfg, corrected = fix(cfg)
        print(f"{path}: {len(corrected)} lines corrected" if corrected else f"{path}: nothing to correct")
        problems = problems_of(cfg)
    if anchors is not None:
        from models.anchor_fit import refit  # with torch, which all else here does without

        raise_errors(problems)
        cfg, num_classes = refit(cfg, anchors)
        classes = num_classes if classes is None and write is not None else classes
    if classes is not None:
        raise_errors(problems)
        cfg, changes = adapt_classes(cfg, classes)
        print("\n".join(changes) or f"{path}: has {classes} classes already")
    if write is not None:
        write_text(write, cfg.text)
        print(f"{write}: written")
    if not quiet:
        print(table(build_graph(cfg, strict=False)))
    return not any(problem.severity == "error" for problem in problems)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.lint", description=__doc__.splitlines()[0])
    parser.add_argument("cfg", nargs="+", type=Path)
    parser.add_argument("--fix", action="store_true", help="write the corrected cfg to FILE.fixed.cfg or to -o")
    parser.add_argument("--classes", type=int, help="adapt classes= and filters= of every head")
    parser.add_argument("--anchors", metavar="DATA", help="fit anchors to the training boxes of a data set")
    parser.add_argument("-o", "--output", type=Path, help="where the corrected or adapted cfg goes")
    parser.add_argument("-q", "--quiet", action="store_true", help="problems only, no table")
    options = parser.parse_args(arguments)
    if options.output and len(options.cfg) > 1:
        raise UserError("-o", f"one output for {len(options.cfg)} cfgs", "lint them one by one")
    sound = True
    for path in options.cfg:
        write = options.output or (path.with_suffix(".fixed.cfg") if options.fix else None)
        if write and write.exists() and options.output is None:
            raise UserError(write, "exists already", "name the output with -o")
        sound &= lint(path, options.classes, options.anchors, write, options.quiet)
    if not sound:
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    run_main(main)
