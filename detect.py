"""Find objects in pictures, folders, videos and streams.

python detect.py --weights runs/train/exp/weights/best.safetensors --source pictures/
python detect.py --weights yolov3.weights --cfg yolov3.cfg --names data/coco.names --source 0
"""

import argparse


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find objects in pictures, folders, videos and streams.")
    network = parser.add_argument_group("network")
    network.add_argument("--weights", required=True, metavar="FILE", help="checkpoint (.safetensors), .weights or .pt")
    network.add_argument("--cfg", metavar="FILE", help="the network; a checkpoint knows its own")
    network.add_argument(
        "--names", "--data", metavar="FILE", help="class names: .names or data .yaml; a checkpoint knows its own"
    )
    network.add_argument("--device", default="", help="cpu, 0, ... (default: the first GPU, else the CPU)")
    network.add_argument("--precision", default="float32", choices=["auto", "float32", "bf16", "fp16"])
    network.add_argument(
        "--half", dest="precision", action="store_const", const="fp16", help="same as --precision fp16"
    )
    seen = parser.add_argument_group("what to look at")
    seen.add_argument(
        "--source",
        default="data/samples",
        help="picture, folder, glob, list.txt, video, camera number, rtsp:// or http:// stream",
    )
    seen.add_argument(
        "--img-size",
        "--imgsz",
        "--img",
        type=int,
        nargs="+",
        metavar="N",
        help="input height [width] (default: the cfg's)",
    )
    seen.add_argument(
        "--resize", choices=["letterbox", "stretch"], help="how a picture is fitted (default: letter_box of the cfg)"
    )
    seen.add_argument("--batch-size", type=int, default=8, metavar="N")
    seen.add_argument("--vid-stride", type=int, default=1, metavar="N", help="look at every N-th frame of a video")
    found = parser.add_argument_group("what counts as found")
    found.add_argument("--conf-thres", type=float, default=0.25)
    found.add_argument(
        "--iou-thres", type=float, default=0.45, help="overlap above which the lower score is suppressed"
    )
    found.add_argument("--max-det", type=int, default=300, metavar="N", help="per picture")
    found.add_argument("--classes", type=int, nargs="+", metavar="N", help="keep these class numbers only")
    found.add_argument("--agnostic-nms", action="store_true", help="suppress across classes")
    written = parser.add_argument_group("what is written")
    written.add_argument("--project", default="runs/detect", metavar="DIR")
    written.add_argument("--name", default="exp", help="folder below --project; exp2, exp3, ... if taken")
    written.add_argument(
        "--exist-ok", action="store_true", help="write into an existing folder (nothing in it is deleted)"
    )
    written.add_argument("--nosave", action="store_true", help="no drawn pictures or videos")
    written.add_argument("--save-txt", action="store_true", help="labels/*.txt: class cx cy w h")
    written.add_argument("--save-conf", action="store_true", help="with the score as sixth column")
    written.add_argument("--save-json", action="store_true", help="detections.json")
    written.add_argument("--save-crop", action="store_true", help="crops/CLASS/*.jpg")
    written.add_argument("--view-img", action="store_true", help="show a window (q closes it)")
    written.add_argument("--line-thickness", type=int, metavar="N")
    written.add_argument("--hide-labels", action="store_true")
    written.add_argument("--hide-conf", action="store_true")
    written.add_argument("--fourcc", default="mp4v", help="video codec")
    written.add_argument("--strict", action="store_true", help="exit 3 if anything could not be read")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """One walk: frames -> letterbox -> network -> original pixels -> files."""
    from tqdm import tqdm

    from models.loading import input_size, load_network, stretches
    from models.predictor import Predictor
    from utils.datasets.records import read_names
    from utils.datasets.sources import open_source
    from utils.errors import QuarantineError
    from utils.results import ResultWriter
    from utils.run import new_run, select_device, select_precision

    # the network
    device = select_device(args.device)
    loaded = load_network(args.weights, cfg=args.cfg, names=read_names(args.names) if args.names else None)
    size = input_size(args.img_size, loaded.model)
    stretch = stretches(args.resize, loaded.model)
    predict = Predictor(
        loaded.model,
        device=device,
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        max_det=args.max_det,
        classes=args.classes,
        agnostic=args.agnostic_nms,
        amp=select_precision(args.precision, device).autocast,
    )

    # the pictures
    source = open_source(args.source, channels=loaded.model.channels, stride=args.vid_stride)
    folder = new_run(args.project, args.name, exist_ok=args.exist_ok)
    writer = ResultWriter(
        folder=folder,
        names=loaded.names,
        save_images=not args.nosave,
        save_txt=args.save_txt,
        save_conf=args.save_conf,
        save_json=args.save_json,
        save_crop=args.save_crop,
        line_thickness=args.line_thickness,
        hide_labels=args.hide_labels,
        hide_conf=args.hide_conf,
        fourcc=args.fourcc,
    )

    # look
    seen, totals = 0, [0] * len(loaded.names)
    try:
        with tqdm(total=source.total, desc="detect", unit="frame", dynamic_ncols=True) as bar:
            for frames in batches(source, args.batch_size):
                for frame, detections in zip(frames, look(predict, frames, size, stretch)):
                    drawn = writer.write(frame, detections)
                    for label in detections.labels.tolist():
                        totals[label] += 1
                    if args.view_img and drawn is not None:
                        show(frame.path, drawn)
                    seen += 1
                bar.update(len(frames))
    finally:
        writer.close()

    # say what happened
    found = ", ".join(f"{count} {name}" for name, count in zip(loaded.names, totals) if count) or "nothing"
    print(f"{seen} frames: {found}")
    if seen:
        parts = " / ".join(f"{1000 * seconds / seen:.1f} ms {name}" for name, seconds in predict.timer.seconds.items())
        print(f"Speed: {parts} per frame at {size[1]}x{size[0]}")
    for problem in source.problems:
        print(f"warning: {problem}")
    print(f"Results: {folder}")
    if source.problems and args.strict:
        raise QuarantineError(args.source, f"{len(source.problems)} of {seen + len(source.problems)} could not be read")
    return 0


def batches(frames, size: int):
    """Lists of up to ``size`` frames; a stream's frames are never held back to fill a batch."""
    batch = []
    for frame in frames:
        batch.append(frame)
        live = frame.fps is not None and frame.total is None
        if len(batch) == size or live:
            yield batch
            batch = []
    if batch:
        yield batch


def look(predict, frames, size, stretch):
    """Detections of each frame, in its own pixels."""
    import numpy as np
    import torch

    from utils.datasets.letterbox import letterbox
    from utils.structures import ImageInfo

    placed = [letterbox(frame.image, size, stretch=stretch) for frame in frames]
    images = torch.from_numpy(np.stack([canvas for canvas, _ in placed])).permute(0, 3, 1, 2)
    for number, (frame, (_, box), detections) in enumerate(zip(frames, placed, predict(images))):
        info = ImageInfo(id=number, path=frame.path, size=frame.image.shape[:2], letterbox=box)
        yield detections.cpu().to_original(info)


def show(title: str, image) -> None:
    """One frame in a window; q or Escape ends the program."""
    import cv2

    cv2.imshow(title, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if cv2.waitKey(1) & 0xFF in (ord("q"), 27):
        raise KeyboardInterrupt


if __name__ == "__main__":
    arguments = parse_args()
    from utils.errors import run_main

    run_main(lambda: main(arguments))
