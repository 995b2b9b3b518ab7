"""Train a detector from a Darknet cfg.

python train.py                                              # a small network on a generated data set
python train.py --cfg yolov3.cfg --data my.yaml --weights darknet53.conv.74
python train.py --set optim.lr0=0.005 --set mosaic=0.5       # change what the recipe says
python train.py --resume                                     # continue the newest run
torchrun --nproc_per_node 2 train.py --cfg yolov3.cfg        # two GPUs, or two processes
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, run_main

ROOT = Path(__file__).resolve().parent


def parse_args(argv: list[str], defaults: dict | None = None) -> argparse.Namespace:
    """The command line; ``defaults`` are what a resumed run was started with."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what to train, on what")
    what.add_argument("--cfg", default=str(ROOT / "cfg/matchbox.cfg"), help="network; yolov3.cfg is found in cfg/ too")
    what.add_argument(
        "--data", default=str(ROOT / "data/shapes.yaml"), help="data.yaml, Darknet .data, COCO .json or a folder"
    )
    what.add_argument("--weights", default="", help="start from .weights, *.conv.NN, .safetensors or .pt")
    what.add_argument("--hyp", default="yolov3", metavar="RECIPE", help="a file, or the name of one in cfg/hyp")
    what.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the recipe")
    what.add_argument("--single-cls", action="store_true", help="treat all classes as one")

    how = parser.add_argument_group("how long, how large")
    how.add_argument("--epochs", type=int, default=30)
    how.add_argument("--batch-size", type=int, default=16, help="images of a batch, over all processes")
    how.add_argument(
        "--img-size",
        "--imgsz",
        "--img",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="side, or height width; default: the cfg's",
    )
    how.add_argument("--rect", action="store_true", help="rectangular batches: pictures of like shape together")
    how.add_argument("--image-weights", action="store_true", help="show pictures with rare classes more often")
    how.add_argument(
        "--freeze",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="one N: the first N layers; several: these layers",
    )
    how.add_argument(
        "--patience", type=int, default=100, help="stop after so many epochs without a better one; 0: never"
    )
    how.add_argument("--seed", type=int, default=0)

    machine = parser.add_argument_group("on what machine")
    machine.add_argument("--device", default="", help="cpu, or the number of a GPU; default: a GPU if there is one")
    machine.add_argument(
        "--workers", type=int, default=None, help="processes that load pictures; default: one per core, 8 at most"
    )
    machine.add_argument("--cache", nargs="?", const="ram", choices=("ram", "disk"), help="keep decoded pictures")
    machine.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 where the processor has it",
    )
    machine.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory layout of convolutions"
    )
    machine.add_argument("--sync-bn", action="store_true", help="batch norm over all GPUs")

    output = parser.add_argument_group("what to write, and where")
    output.add_argument("--project", default="runs/train", help="folder of all runs")
    output.add_argument("--name", default="exp", help="this run's folder in it; numbered if taken")
    output.add_argument("--exist-ok", action="store_true", help="write into project/name even if it is there")
    output.add_argument("--nosave", action="store_true", help="checkpoints after the last epoch only")
    output.add_argument("--noval", "--notest", action="store_true", help="evaluate after the last epoch only")
    output.add_argument("--save-period", type=int, default=0, metavar="N", help="keep a checkpoint of every N-th epoch")
    output.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="continue a run folder or checkpoint; default: the newest"
    )
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(**(defaults or {}))
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args(sys.argv[1:])  # before anything heavy is imported, so that --help is quick
    from utils import distributed
    from utils.run import select_device

    device = select_device(args.device)
    with distributed.process_group(device):
        train(args, device)


def train(args: argparse.Namespace, device) -> None:
    import torch

    from models.darknet_weights import write_weights
    from models.losses import TrainStep, build_criterion
    from models.predictor import Predictor
    from utils import distributed
    from utils.checkpoint import load_module, read_checkpoint, weights_of, write_checkpoint
    from utils.evaluate import evaluate
    from utils.fitness import Best, fitness
    from utils.gallery import Gallery
    from utils.logger import Logger
    from utils.plots import save_evaluation_plots, save_labels_png, save_results_png
    from utils.run import WEIGHTS, select_precision, set_seed
    from utils.timing import Waiting
    from utils.trainer import Trainer

    # ---- what: network, recipe, data; everything a person can get wrong is found before anything is written --------
    args, cfg, recipe, resumed = begin(args)
    set_seed(args.seed)
    precision = select_precision(args.precision, device)
    with distributed.main_first():
        data = open_data(args)
    model = build_network(args, cfg, data, resumed).to(device)
    criterion = build_criterion(recipe.assigner, recipe.loss, model.num_classes, args.hyp).to(device)
    train_loader, val_loader = build_loaders(args, model, recipe, data, device)

    # ---- where: the run's own folder --------------------------------------------------------------------------------
    run = open_run(args, model, recipe, resumed, device)
    logger = Logger(run if distributed.is_main() else None, start_epoch=resumed.meta["epoch"] if resumed else 0)
    gallery = Gallery(run, data.names, logger)
    logger.say(f"{model.cfg.path}: {describe(model)}, {criterion_name(recipe)}, {precision.name} on {device}\n{run}")

    # ---- how: optimiser, average, schedule ---------------------------------------------------------------------------
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    trainer = Trainer(
        TrainStep(model, criterion),
        optim=recipe.optim,
        device=device,
        precision=precision,
        num_batches=len(train_loader),
        batch_size=args.batch_size,
        epochs=args.epochs,
    )
    best = Best()
    if resumed:
        trainer.restore(resumed.tensors, resumed.meta, resumed.path)
        best = Best(**resumed.meta["best"])
    predictor = Predictor(trainer.ema.module, device=device, conf_thres=0.001, iou_thres=0.6, amp=precision.autocast)
    with logger.guard("labels.png"):
        save_labels_png(data.train, data.names, run / "labels.png")
    logger.graph(trainer.ema.module, torch.zeros(1, model.channels, *model.size, device=device))

    def save(name: str) -> None:
        meta = {"cfg": model.cfg.text, "names": data.names, "recipe": recipe.as_dict(), "args": vars(args)}
        meta |= {"best": best.as_dict(), **trainer.counters()}
        write_checkpoint(run / WEIGHTS / f"{name}.safetensors", trainer.tensors(), meta)

    # ---- the epochs --------------------------------------------------------------------------------------------------
    for epoch in range(trainer.epoch, args.epochs):
        start, waiting = time.perf_counter(), Waiting(train_loader)
        train_loader.batch_sampler.set_epoch(epoch)
        with logger.bar(f"epoch {epoch + 1}/{args.epochs}", len(train_loader)) as bar:
            losses = trainer.train_epoch(gallery.train(waiting) if epoch == 0 else waiting, bar.show)
        seconds = time.perf_counter() - start
        row = {"epoch": epoch, **{f"train/{name}": value for name, value in losses.items()}, "lr": trainer.lr}
        details = {"wait": waiting.seconds / seconds, "images_per_second": len(data.train) / seconds}
        is_last, is_better = epoch == args.epochs - 1, False
        if distributed.is_main() and (is_last or not args.noval):
            evaluation = evaluate(predictor, val_loader, data.val, data.names, progress=logger.watched)
            scalars = evaluation.scalars()
            row |= {name: scalars[name] for name in MAIN_METRICS}
            details |= {name: value for name, value in scalars.items() if name not in row}
            is_better = best.update(fitness(scalars), epoch)
        logger.epoch(row | {"seconds": time.perf_counter() - start}, details)
        if distributed.is_main() and (is_last or not args.nosave):
            save("last")
            if is_better:
                save("best")
            if args.save_period and (epoch + 1) % args.save_period == 0:
                save(f"epoch{epoch}")
        if distributed.broadcast(best.is_stale(epoch, args.patience) and not args.noval, device):
            logger.say(f"no better epoch than {best.epoch} for {args.patience} epochs: stopped early")
            break

    # ---- the best epoch, looked at closely ---------------------------------------------------------------------------
    if not distributed.is_main():
        return
    final = next(file for name in ("best", "last") if (file := run / WEIGHTS / f"{name}.safetensors").exists())
    load_module(trainer.ema.module, weights_of(read_checkpoint(final)[0]), final)
    evaluation = evaluate(predictor, val_loader, data.val, data.names, observe=gallery.val, progress=logger.watched)
    write_weights(trainer.ema.module, final.with_suffix(".weights"))
    for what, draw in {
        "results.png": lambda: save_results_png(run / "results.csv", run / "results.png"),
        "evaluation plots": lambda: save_evaluation_plots(evaluation, run),
    }.items():
        with logger.guard(what):
            draw()
    logger.close()
    logger.say(f"\n{evaluation.table(verbose=True)}\n\n{where_things_are(run, final, best)}")


# ---- the chapters ----------------------------------------------------------------------------------------------------

MAIN_METRICS = tuple(f"metrics/{name}" for name in ("precision", "recall", "mAP50", "mAP50-95"))


class Resumed(NamedTuple):
    """The checkpoint a run continues from."""

    path: Path
    tensors: dict
    meta: dict


class Data(NamedTuple):
    """Both splits of the data set."""

    names: list[str]
    train: list
    val: list


def begin(args: argparse.Namespace):
    """(args, cfg, recipe, the checkpoint or None): from the command line, or from the run that continues."""
    from models.cfg import parse_cfg, read_cfg
    from models.loading import find_file
    from utils.checkpoint import read_checkpoint
    from utils.config import make_recipe, read_recipe
    from utils.run import find_run

    if args.resume is None:
        cfg = read_cfg(find_file(args.cfg, "cfg"))
        return args, cfg, read_recipe(args.hyp, args.set), None
    if args.set:
        raise UserError(
            "--set", "a run that continues keeps its recipe", "--weights RUN/weights/last.safetensors starts a new one"
        )
    path, damaged = find_run(args.project, args.resume)
    for error in damaged:
        print(f"warning: passed over {error}", file=sys.stderr)
    tensors, meta = read_checkpoint(path)
    args = parse_args(sys.argv[1:], meta["args"])  # flags given again win
    if meta["epoch"] >= args.epochs:
        raise UserError(path, f"all {args.epochs} epochs are done", "--epochs with a larger number extends the run")
    return args, parse_cfg(meta["cfg"], f"{path}[cfg]"), make_recipe(meta["recipe"], path), Resumed(path, tensors, meta)


def open_data(args: argparse.Namespace) -> Data:
    """Both splits; says what is wrong with them."""
    import numpy as np

    from utils.datasets.records import read_dataset
    from utils.distributed import is_main

    splits = [read_dataset(args.data, split) for split in ("train", "val")]
    if is_main():
        print("\n".join(split.summary() for split in splits))
    names, records = list(splits[0].names), [split.records for split in splits]
    if args.single_cls:
        names = ["object"]
        records = [[replace(one, labels=np.zeros_like(one.labels)) for one in split] for split in records]
    return Data(names, *records)


def build_network(args: argparse.Namespace, cfg, data: Data, resumed: Resumed | None):
    """The cfg with the data's classes and the size asked for, started from --weights, some layers frozen."""
    from models.cfg import adapt_classes
    from models.darknet import Darknet
    from models.loading import find_file
    from models.pretrained import load_pretrained
    from models.section import listing
    from utils.distributed import is_main

    say = print if is_main() else lambda text: None
    cfg, changes = adapt_classes(cfg, len(data.names))
    if changes:
        say(f"{len(data.names)} classes in the data; the network follows:\n  " + "\n  ".join(changes))
    if args.img_size and not resumed:
        height, width = args.img_size if len(args.img_size) == 2 else args.img_size * 2
        cfg = cfg.with_options([(cfg.net, "width", width), (cfg.net, "height", height)])
    model = Darknet(cfg)
    if noticed := (*cfg.warnings, *model.graph.problems):
        say(listing(noticed))
    if any(side <= 0 or side % model.stride for side in model.size):
        near = [max(1, round(side / model.stride)) * model.stride for side in model.size]
        raise UserError(
            "--img-size", f"{model.size} are not multiples of {model.stride}", f"--img-size {near[0]} {near[1]}"
        )
    if args.weights and not resumed:
        say(load_pretrained(model, find_file(args.weights, "weights file")).summary())
    for number in range(args.freeze[0]) if len(args.freeze) == 1 else args.freeze:
        if not 0 <= number < len(model.layers):
            raise UserError(f"--freeze {number}", f"no such layer, the network has {len(model.layers)}")
        model.layers[number].requires_grad_(False)
    return model


def build_loaders(args: argparse.Namespace, model, recipe, data: Data, device):
    """Loaders of augmented training batches and of plain rectangular validation batches."""
    from utils.datasets.cache import build_cache
    from utils.datasets.dataset import DetectionDataset
    from utils.datasets.loader import EvalSampler, TrainSampler, balance_weights, build_loader
    from utils.distributed import main_first, rank, world_size

    share, rest = divmod(args.batch_size, world_size())
    if share < 1 or rest:
        raise UserError(f"--batch-size {args.batch_size}", f"not a multiple of {world_size()} processes")
    caches = [None, None]
    if args.cache:
        with main_first():
            caches = [
                build_cache(args.cache, split, max_side=max(model.size), channels=model.channels) for split in data[1:]
            ]
    training = DetectionDataset(
        data.train, channels=model.channels, augment=recipe.augment, seed=args.seed, cache=caches[0], epochs=args.epochs
    )
    validation = DetectionDataset(data.val, channels=model.channels, cache=caches[1])
    sampler = TrainSampler(
        len(training),
        share,
        size=model.size,
        seed=args.seed,
        multi_scale=recipe.augment.multi_scale,
        weights=balance_weights(data.train, len(data.names)) if args.image_weights else None,
        image_sizes=training.sizes if args.rect else None,
        rank=rank(),
        world=world_size(),
        stride=model.stride,
    )
    workers = args.workers if args.workers is not None else min(8, (os.cpu_count() or 1) // world_size())
    options = {"workers": workers, "pin_memory": device.type == "cuda"}
    eval_sampler = EvalSampler(validation.sizes, share, model.size, stride=model.stride)
    return build_loader(training, sampler, **options), build_loader(validation, eval_sampler, **options)


def open_run(args: argparse.Namespace, model, recipe, resumed: Resumed | None, device) -> Path:
    """The run's folder, with args, recipe and cfg beside what comes."""
    import yaml

    from utils import distributed
    from utils.files import write_text
    from utils.run import WEIGHTS, new_run

    run = None
    if distributed.is_main():
        run = resumed.path.parents[1] if resumed else new_run(args.project, args.name, args.exist_ok)
        (run / WEIGHTS).mkdir(exist_ok=True)
        write_text(run / "args.yaml", yaml.safe_dump(vars(args), sort_keys=False))
        write_text(run / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
        write_text(run / "network.cfg", model.cfg.text)
    return Path(distributed.broadcast(str(run), device))


def describe(model) -> str:
    """How large the network is."""
    params, flops = (sum(getattr(layer, name) for layer in model.graph.layers) for name in ("params", "flops"))
    height, width = model.size
    return f"{len(model.layers)} layers, {params / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP at {width}x{height}"


def criterion_name(recipe) -> str:
    return f"{recipe.assigner['name']} + {recipe.loss['name']}"


def where_things_are(run: Path, final: Path, best) -> str:
    """The end of the story: what lies where."""
    return "\n".join(
        [
            f"best epoch {best.epoch}, fitness {best.fitness:.4f} = 0.1 mAP50 + 0.9 mAP50-95",
            f"checkpoint   {final}",
            f"for Darknet  {final.with_suffix('.weights')} with {run / 'network.cfg'}",
            f"pictures     {run}/train_batch*.jpg, {run}/val_batch*_labels.jpg, {run}/val_batch*_pred.jpg",
            f"plots        {run}/*.png",
            f"numbers      {run / 'results.csv'}, {run / 'log.jsonl'}",
            f"TensorBoard  tensorboard --logdir {run / 'tensorboard'}",
        ]
    )


if __name__ == "__main__":
    run_main(main)
