"""Train a detector from a Darknet cfg.

python train.py                                              # a small network on a generated data set
python train.py --cfg yolov3.cfg --data my.yaml --weights darknet53.conv.74
python train.py --set optim.lr0=0.005 --set mosaic=0.5       # change what the recipe says
python train.py --resume                                     # continue the newest run
torchrun --nproc_per_node 2 train.py --cfg yolov3.cfg        # two GPUs, or two processes
"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from utils.errors import DivergenceError, Stopped, UserError, run_main
from utils.interrupts import Interrupts
from utils.training_arguments import AUTO, parse_args


def main() -> None:
    args = parse_args(sys.argv[1:], description=__doc__)  # before anything heavy is imported, so that --help is quick
    with Interrupts() as interrupts:
        from utils import distributed
        from utils.run import select_device

        device = select_device(args.device)
        with distributed.process_group(device), ExitStack() as held:
            train(args, device, interrupts, held)


def train(args: argparse.Namespace, device, interrupts: Interrupts, held: ExitStack) -> None:
    import torch

    from models.assignment_pictures import sheets
    from models.darknet_weights import write_weights
    from models.foreign import foreign_to_darknet
    from models.head_losses import head_losses
    from models.losses import TrainStep, build_criterion
    from models.predictor import Predictor
    from utils import distributed
    from utils.allocator import keep_freed_memory
    from utils.bad_batch import BadBatches
    from utils.checkpoint import load_module, weights_of
    from utils.datasets.limits import Limits
    from utils.datasets.quarantine import extend_quarantine, write_quarantine
    from utils.datasets.splits import build_loaders, read_splits
    from utils.evaluate import evaluate, refuse_invalid
    from utils.files import write_text
    from utils.fitness import Best, fitness
    from utils.gallery import Gallery
    from utils.logger import Logger
    from utils.mistakes import Mistakes
    from utils.plots import save_evaluation_plots, save_labels_png, save_results_png
    from utils.report import save_report
    from utils.resume import is_finished, refuse_other_data, write_summary
    from utils.run import WEIGHTS, lock_run, select_precision, set_seed, share_cores, shared_new_run
    from utils.saver import Saver
    from utils.store import Store
    from utils.timing import Waiting

    # ---- what: network, recipe, data; everything a person can get wrong is found before anything is written --------
    args, cfg, recipe, resumed = begin(args)
    patience = 0 if args.noval else args.patience
    if resumed and is_finished(resumed, args.epochs, patience):
        done = f"{resumed.meta['epoch']} epochs are done"
        print(f"{resumed.path}: {done}, nothing to do; a larger --epochs, or --patience where it ended early, goes on")
        return
    set_seed(args.seed)
    if device.type == "cpu":
        keep_freed_memory()
    precision = select_precision(args.precision, device)
    if args.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn", "batch norms are synchronised on GPUs only", "leave it out")
    with distributed.main_first():
        data = read_splits(args.data, single_cls=args.single_cls, masks=cfg.has_masks, limits=Limits.of(args))
    if resumed:
        refuse_other_data(resumed.meta, data.fingerprint, args.allow_data_change, args.data)
    model, size, cfg = build_network(args, cfg, data.names, resumed)
    fixed = {"cfg": cfg.text, "names": data.names, "recipe": recipe.as_dict(), "data": data.fingerprint}
    distributed.agree(fixed | {"checkpoint": resumed and resumed.meta["sha256"]})
    criterion = build_criterion(recipe.assigner, recipe.loss, model.num_classes, args.hyp, model.heads)
    step = TrainStep(model, criterion).to(device)
    if args.batch_size == AUTO:
        args.batch_size = automatic_batch(step, data, recipe, device, precision, size)
    train_loader, val_loader = build_loaders(
        data,
        recipe.augment,
        batch_size=args.batch_size,
        size=size,
        stride=model.stride,
        channels=model.channels,
        stretch=not cfg.net.flag("letter_box"),
        rect=args.rect,
        balance=args.image_weights,
        cache=args.cache,
        seed=args.seed,
        epochs=args.epochs,
        workers=share_cores(device, args.workers),
        pin_memory=device.type == "cuda",
    )
    if args.selftest:
        return selftest(args, step, data, val_loader, size)
    if args.dry_run:
        trainer = build_trainer(args, step, recipe, device, precision, len(train_loader))
        return dry_run(args, trainer, data, recipe, (train_loader, val_loader), size)

    # ---- where: the run's own folder, with everything beside the results that is needed to do it again --------------
    run = resumed.path.parents[1] if resumed else shared_new_run(args.project, args.name, args.exist_ok)
    if distributed.is_main():
        held.enter_context(lock_run(run))
    logger = Logger(run if distributed.is_main() else None, start_epoch=resumed.meta["epoch"] if resumed else 0)
    store = Store(run / WEIGHTS, say=logger.say)
    if distributed.is_main():
        for name, text in settings(args, recipe, cfg).items():
            write_text(run / name, text)
        (extend_quarantine if resumed else write_quarantine)(run, data.problems)
    for loader in (train_loader, val_loader):
        loader.dataset.quarantine.folder = run
    gallery = Gallery(run, data.names, logger)
    logger.say(f"{recipe.assigner['name']} + {recipe.loss['name']}, {precision.name} on {device}, {run}")

    # ---- how: optimiser, average, schedule ---------------------------------------------------------------------------
    trainer = build_trainer(args, step, recipe, device, precision, len(train_loader))
    trainer.report = BadBatches(run, train_loader, logger)
    best = Best()
    saver = Saver(
        store,
        trainer,
        best,
        logger,
        interrupts,
        fixed=fixed | {"args": vars(args)},
        minutes=float("inf") if args.nosave else args.save_interval,
        resumed=resumed,
    )
    predictor = Predictor(trainer.ema.module, device=device, conf_thres=0.001, iou_thres=0.6, amp=precision.autocast)
    if distributed.is_main():
        store.check_space(trainer.tensors())
        with logger.guard("labels.png"):
            save_labels_png(data.train, data.names, run / "labels.png")

    # ---- the epochs: a run that continues may begin anywhere in one --------------------------------------------------
    def is_over() -> bool:
        return best.ends(trainer.epoch, args.epochs, patience)

    with interrupts.between_steps():
        while not is_over():
            epoch, first, start = trainer.epoch, trainer.batches_done, time.perf_counter()
            train_loader.batch_sampler.set_epoch(epoch, first)
            waiting = Waiting(train_loader)
            batches = gallery.train(waiting) if epoch == first == 0 and distributed.is_main() else waiting
            try:
                with logger.bar(f"epoch {epoch + 1}/{args.epochs}", len(train_loader)) as bar:
                    losses = trainer.train_epoch(batches, bar.show, saver.between_steps)
            except DivergenceError as error:
                saver.roll_back(error)
                continue
            seconds = time.perf_counter() - start
            scalars, stop = {}, 0
            if distributed.is_main() and (epoch == args.epochs - 1 or not args.noval):
                try:
                    watched = interrupts.watched(val_loader)
                    observe = gallery.followed(epoch)
                    found = evaluate(predictor, watched, data.val, data.names, observe=observe, progress=logger.watched)
                    scalars = found.scalars()
                except Stopped:
                    stop = interrupts.stop
            stop, score = distributed.broadcast([stop, fitness(scalars) if scalars else float("nan")])
            saver.stop_if(stop)  # the epoch's steps are done: a run that continues begins with its evaluation
            is_better = best.update(score, epoch)
            row = {"epoch": epoch, **{f"train/{name}": value for name, value in losses.items()}, "lr": trainer.lr}
            row |= {name: scalars[name] for name in MAIN_METRICS if name in scalars}
            row |= {"time/wait": waiting.seconds / seconds, "time/seconds": time.perf_counter() - start}
            details = {name: value for name, value in scalars.items() if name not in row}
            details |= {"steps/skipped": trainer.skipped, "steps/clipped": trainer.clipped}
            details["time/images_per_second"] = len(data.train) * (1 - first / len(train_loader)) / seconds
            logger.epoch(row, details)
            trainer.end_epoch()
            if is_over() or not args.nosave:
                keep_every = args.save_period and (epoch + 1) % args.save_period == 0
                save = saver.save_at_last if is_over() else saver.save
                save(["best"] * is_better + [f"epoch{epoch}"] * bool(keep_every))
            if epoch == 0:  # not before it: tracing takes a second that a person would wait for the first step
                logger.graph(trainer.ema.module, torch.zeros(1, model.channels, *size, device=device))
            if gallery.followed_batch and distributed.world_size() == 1:
                with logger.guard("the losses of the heads"):
                    logger.curves(head_losses(trainer.ema.module, criterion, gallery.followed_batch), epoch)
            if args.show_assignments and scalars:
                gallery.sheets("assignments", lambda: sheets(trainer.ema.module, next(iter(val_loader))), epoch)
    if trainer.epoch < args.epochs:
        logger.say(f"no better epoch than {best.epoch} for {patience} epochs: stopped early")

    # ---- the best epoch, looked at closely ---------------------------------------------------------------------------
    if not distributed.is_main():
        return
    final, tensors = saver.final()
    load_module(trainer.ema.module, weights_of(tensors), final)
    watched = interrupts.watched(val_loader)
    mistakes = Mistakes(data.val, data.names)

    def look_closely(batch, found) -> None:
        gallery.val(batch, found)
        with logger.guard("the report's mistakes"):
            mistakes.update(batch, found)

    evaluation = evaluate(predictor, watched, data.val, data.names, observe=look_closely, progress=logger.watched)
    foreign = foreign_to_darknet(cfg)
    if not foreign:
        write_weights(trainer.ema.module, final.with_suffix(".weights"))
    for what, draw in {
        "results.png": lambda: save_results_png(run / "results.csv", run / "results.png"),
        "evaluation plots": lambda: save_evaluation_plots(evaluation, run),
        "report.html": lambda: save_report(run, evaluation, mistakes, facts(args, size, trainer.epoch, best)),
    }.items():
        with logger.guard(what):
            draw()
    logger.close()
    write_summary(run, {"epochs": trainer.epoch, "best": best.as_dict(), **evaluation.scalars()})
    logger.say(f"\n{evaluation.table(verbose=True)}\n{where_things_are(run, final, best, foreign)}")
    refuse_invalid(evaluation.num_invalid, final)


# ---- the chapters ----------------------------------------------------------------------------------------------------

MAIN_METRICS = tuple(
    f"metrics/{name}" for name in ("precision", "recall", "mAP50", "mAP50-95", "mask-mAP50", "mask-mAP50-95")
)


def begin(args: argparse.Namespace):
    """(args, cfg, recipe, the checkpoint or None): from the command line, or from the run that continues."""
    from models.cfg import parse_cfg, read_cfg
    from models.loading import find_file
    from utils.config import make_recipe, read_recipe
    from utils.resume import find_resumed, refuse_changes

    resumed = find_resumed(args.project, args.name, args.resume)
    if resumed is None:
        return args, read_cfg(find_file(args.cfg, "cfg")), read_recipe(args.hyp, args.set), None
    before, path = resumed.meta["args"], resumed.path
    args = parse_args(sys.argv[1:], before | {"set": []})  # flags given again are compared
    args.set = args.set or before["set"]
    args.batch_size = before["batch_size"] if args.batch_size == AUTO else args.batch_size
    refuse_changes(before, vars(args), path)
    return args, parse_cfg(resumed.meta["cfg"], f"{path}[cfg]"), make_recipe(resumed.meta["recipe"], path), resumed


def build_network(args: argparse.Namespace, cfg, names: list[str], resumed):
    """(model, (H, W), cfg): with the data's classes, started from --weights, some layers frozen.

    The cfg is what a checkpoint keeps: it also says the size asked for, and that pictures are letterboxed.
    """
    from models.cfg import adapt_classes
    from models.darknet import Darknet
    from models.loading import find_file, input_size
    from models.pretrained import load_pretrained
    from models.section import listing
    from utils.distributed import is_main

    say = print if is_main() else lambda text: None
    cfg, changes = adapt_classes(cfg, len(names))
    if changes:
        say(f"{len(names)} classes in the data; the network follows:\n  " + "\n  ".join(changes))
    model = Darknet(cfg)
    if noticed := (*cfg.warnings, *model.graph.problems):
        say(listing(noticed))
    height, width = input_size(args.img_size or None, model)
    kept = [("width", width), ("height", height)] + [("letter_box", 1)] * ("letter_box" not in cfg.net)
    if args.weights and not resumed:
        say(load_pretrained(model, find_file(args.weights, "weights file")).summary())
    for number in range(args.freeze[0]) if len(args.freeze) == 1 else args.freeze:
        if number >= len(model.layers):
            raise UserError(f"--freeze {number}", f"no such layer, the network has {len(model.layers)}")
        model.layers[number].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze", "every layer is frozen, nothing is left to be taught", "name fewer")
    params, flops = (sum(getattr(layer, name) for layer in model.graph.layers) for name in ("params", "flops"))
    say(f"{cfg.path}: {len(model.layers)} layers, {params / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP")
    return model, (height, width), cfg.with_options([(cfg.net, key, value) for key, value in kept])


def build_trainer(args: argparse.Namespace, step, recipe, device, precision, num_batches: int):
    """The network with its optimiser and average, as the flags say."""
    import torch
    from torch import nn

    from utils.trainer import Trainer

    if args.channels_last:
        step.to(memory_format=torch.channels_last)
    if args.sync_bn:
        step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
    if args.compile:
        step.model.compile(mode=args.compile, dynamic=False)
    return Trainer(
        step,
        optim=recipe.optim,
        device=device,
        precision=precision,
        num_batches=num_batches,
        batch_size=args.batch_size,
        epochs=args.epochs,
    )


def trial_batches(data, recipe, channels: int, size: tuple[int, int]):
    """A function: how many pictures -> a batch as full and large as training may have."""
    from utils.plan import trial_batch

    largest = tuple(round(side * max(recipe.augment.multi_scale) / 32) * 32 for side in size)
    return lambda num: trial_batch(data.train, num, largest, channels, mosaic=recipe.augment.mosaic > 0)


def automatic_batch(step, data, recipe, device, precision, size: tuple[int, int]) -> int:
    """Pictures of a batch over all processes: those of a whole step of the recipe, or as many as memory holds."""
    from utils.distributed import broadcast, is_main, world_size
    from utils.plan import fitting_batch

    num = None
    if is_main():
        most = max(1, min(recipe.optim.nominal_batch, len(data.train)) // world_size())
        make = trial_batches(data, recipe, step.model.channels, size)
        num, line = fitting_batch(step, make, device, precision, most=most)
        print(line)
    return broadcast(num) * world_size()


def dry_run(args: argparse.Namespace, trainer, data, recipe, loaders, size: tuple[int, int]) -> None:
    """What this training will take. Raises ResourceError where it would not come to its end."""
    from datetime import datetime

    from models.predictor import Predictor
    from utils.distributed import world_size
    from utils.plan import measure

    if world_size() > 1:
        raise UserError("--dry-run", "measures one process", "python train.py without torchrun")
    model, precision = trainer.ema.module, trainer.precision
    plan = measure(
        trainer,
        *loaders,
        Predictor(model, device=trainer.device, conf_thres=0.001, iou_thres=0.6, amp=precision.autocast),
        trial_batches(data, recipe, model.channels, size),
        num_evaluations=1 if args.noval else args.epochs + 1,
        save_period=args.save_period,
        project=args.project,
    )
    print(plan.table(datetime.now()))
    plan.refuse()


def selftest(args: argparse.Namespace, step, data, val_loader, size: tuple[int, int]) -> None:
    """Why is my mAP zero? Asks on the console, leaves a page. Raises UserError where something keeps it there."""
    from models.selftest import examine, refuse, verdict
    from models.selftest_page import page
    from utils.distributed import world_size
    from utils.files import write_text
    from utils.run import new_run

    if world_size() > 1:
        raise UserError("--selftest", "is one process", "python train.py without torchrun")
    checks, story = examine(step, data, val_loader, size, say=lambda check: print(check, flush=True))
    file = new_run(args.project, f"{args.name}-selftest", args.exist_ok) / "index.html"
    notes = [f"Network: {args.cfg}", f"Weights: {args.weights or 'none'}", f"Recipe: {args.hyp}", f"Data: {args.data}"]
    write_text(file, page(checks, verdict(checks), story, data.names, notes=notes))
    print(f"\n{verdict(checks)}\nMore: {file}")
    refuse(checks, file)


def settings(args: argparse.Namespace, recipe, cfg) -> dict[str, str]:
    """What lies beside the results, file by file: enough to do it again."""
    import yaml

    texts = {"args.yaml": vars(args), "recipe.yaml": recipe.as_dict()}
    return {name: yaml.safe_dump(values, sort_keys=False) for name, values in texts.items()} | {"network.cfg": cfg.text}


def facts(args: argparse.Namespace, size: tuple[int, int], epochs: int, best) -> dict[str, str]:
    """What a run was, for its report."""
    return {
        "network": f"{args.cfg} at {size[1]} x {size[0]}",
        "started from": args.weights or "scratch",
        "recipe": " ".join([args.hyp, *args.set]),
        "data": args.data,
        "epochs": f"{epochs} of {args.epochs}, the best is {best.epoch}; batches of {args.batch_size}",
    }


def where_things_are(run: Path, final: Path, best, foreign: list) -> str:
    """The end of the story: what lies where; with ``foreign`` sections nothing lies there for Darknet."""
    darknet = f"{final.with_suffix('.weights')} with {run / 'network.cfg'}"
    return f"""
report       {run / "report.html"}
best epoch   {best.epoch}, fitness {best.fitness:.4f} = 0.1 mAP50 + 0.9 mAP50-95
checkpoint   {final}
for Darknet  {f"none: {foreign[0].message}" if foreign else darknet}
elsewhere    python -m models.export {final}
pictures     {run}/train_batch*.jpg, {run}/val_batch*_labels.jpg, {run}/val_batch*_pred.jpg
plots        {run}/*.png
numbers      {run / "results.csv"}, {run / "log.jsonl"}
TensorBoard  tensorboard --logdir {run / "tensorboard"}"""


if __name__ == "__main__":
    run_main(main)
