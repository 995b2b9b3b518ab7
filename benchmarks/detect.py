"""Detection on one core of a CPU with yolov3-tiny at 416: the network alone, a picture from file to boxes, a folder.

python -m benchmarks.detect
python -m benchmarks.detect --quick            # does it run?

*Network*: our own as detect.py runs it, beside ONNX Runtime and OpenVINO (bf16 where the processor has it) on the same
weights, batch 1, and beside plain PyTorch (norms folded, float32, as it comes).
*Picture*: from a JPEG of 640 x 480 to boxes in its pixels, beside ultralytics' ``predict`` with its own yolov3-tiny
(6.2 GFLOP on a rectangular input; ours 5.6 on a square one). All networks have random weights: nothing is found.
Darknet is no package: C Darknet does 0.42 / 1.42 of ultralytics' pictures per second on such a core (measured once,
end to end), so ``DARKNET`` times ours against ultralytics is ours against Darknet.
*Folder*: detect.py as a whole, drawing and writing, beside the same without a thread for each step; wall time.

CPU time, one thread, but the folder. Peers without network: YOLO_OFFLINE=true YOLO_CONFIG_DIR=FOLDER.
"""

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch

import detect
import utils.prefetch
from benchmarks.paired import peer, take_turns, verdict
from models.cfg import read_cfg
from models.darknet import Darknet
from models.darknet_weights import write_weights
from models.inference import for_inference
from models.predictor import Predictor
from utils.datasets.sources import open_source
from utils.errors import run_main
from utils.run import select_precision, set_seed

CFG = Path(__file__).resolve().parents[1] / "cfg/yolov3-tiny.cfg"
CPU, SIZE = torch.device("cpu"), (416, 416)
OURS, PLAIN = "matchbox", "plain float32"
DARKNET = 1.42 / 0.42


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.detect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="two pictures, one round")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.quick:
        args.rounds, args.pictures = 1, 2
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    set_seed(0)
    model = Darknet(read_cfg(CFG)).eval()
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder), args.pictures)
        for name in args.parts:
            rounds, goals = PARTS[name](model, Path(folder), args.rounds)
            print(f"\n{name}\n{rounds.table(next(iter(rounds.seconds)))}")
            for what, base, goal in () if args.quick else goals:
                if base in rounds.seconds:
                    print(verdict(f"detect, {name}", what, base, rounds, goal, CPU))


def make_pictures(folder: Path, num: int) -> None:
    """JPEGs of 640 x 480 and about 200 KB, as COCO's are."""
    rng = np.random.default_rng(0)
    for number in range(num):
        coarse = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        fine = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 6, (480, 640, 3))
        cv2.imwrite(str(folder / f"{number:03d}.jpg"), np.clip(fine, 0, 255).astype(np.uint8))


def network(model: Darknet, folder: Path, num_rounds: int):
    """Batch 1, contiguous for those that want it so, else channels-last."""
    image = torch.rand(1, 3, *SIZE)
    last, plain, dtype = image.contiguous(memory_format=torch.channels_last), model.fuse(), best_dtype()
    contenders = {PLAIN: lambda: plain(image)}
    for name, kind in ((f"{OURS} float32", torch.float32), (OURS, dtype)):
        contenders[name] = autocast(for_inference(model, CPU, kind), last, kind)
    if runtime := peer("onnxruntime", "onnxruntime"):
        contenders["ONNX Runtime"] = onnx_runtime(runtime, plain, image)
    if openvino := peer("openvino", "openvino"):
        contenders["OpenVINO"] = open_vino(openvino, plain, image, dtype)
    with torch.inference_mode():
        rounds = take_turns(contenders, rounds=num_rounds, warmup=3)
    return rounds, [(OURS, PLAIN, 3.26), (OURS, "ONNX Runtime", 1.4), (OURS, "OpenVINO", 1 / 1.3)]


def best_dtype() -> torch.dtype:
    return select_precision("auto", CPU).dtype


def autocast(model: Darknet, images: torch.Tensor, dtype: torch.dtype):
    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(images.to(dtype))

    return run


def onnx_runtime(runtime, model: Darknet, image: torch.Tensor):
    """One thread. It has no bfloat16 kernels for a CPU."""
    exported = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (image,), exported, dynamo=False, input_names=["images"], opset_version=17)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(exported.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"images": image.numpy()}
    return lambda: session.run(None, feed)


def open_vino(openvino, model: Darknet, image: torch.Tensor, dtype: torch.dtype):
    """One thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=image)
    hints = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_PRECISION_HINT"] = "bf16" if dtype == torch.bfloat16 else "f32"
    request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()
    pixels = image.numpy()
    return lambda: request.infer([pixels])


def picture(model: Darknet, folder: Path, num_rounds: int):
    """One after the other, from file to boxes."""
    files = sorted(map(str, folder.glob("*.jpg")))
    contenders = {}
    for name, dtype in ((f"{OURS} float32", torch.float32), (OURS, best_dtype())):
        amp = None if dtype == torch.float32 else dtype
        predict = Predictor(for_inference(model, CPU, dtype), amp=amp)
        contenders[name] = lambda predict=predict: look(predict, folder)
    if ultralytics := peer("ultralytics", "ultralytics"):
        theirs = ultralytics.YOLO("yolov3-tiny.yaml", verbose=False)
        contenders["ultralytics"] = lambda: [
            theirs.predict(file, imgsz=SIZE[0], device="cpu", verbose=False) for file in files
        ]
    rounds = take_turns(contenders, rounds=num_rounds, units=len(files))
    if "ultralytics" in rounds.seconds:
        rounds.seconds["Darknet, through ultralytics"] = [
            seconds * DARKNET for seconds in rounds.seconds["ultralytics"]
        ]
    return rounds, [(OURS, "ultralytics", 2.0), (OURS, "Darknet, through ultralytics", 7.0)]


def look(predict: Predictor, folder: Path) -> list:
    """The walk of detect.py, without what it writes."""
    return list(detect.look(predict, detect.place(open_source(str(folder)), 1, SIZE, stretch=True)))


def whole_folder(model: Darknet, folder: Path, num_rounds: int):
    """detect.py with its defaults, the network loaded in both; a thread per step, or none."""
    write_weights(model, folder / "random.weights")
    flags = ["--weights", str(folder / "random.weights"), "--cfg", str(CFG), "--source", str(folder)]
    arguments = detect.parse_args([*flags, "--device", "cpu", "--project", str(folder / "runs"), "--conf-thres", "0.3"])
    ahead = utils.prefetch.prefetch

    def run(prefetch):
        utils.prefetch.prefetch = prefetch
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                detect.main(arguments)
        finally:
            utils.prefetch.prefetch = ahead

    contenders = {
        "in turn": lambda: run(lambda items, depth=1: items),
        OURS: lambda: run(ahead),
    }
    units = len(list(folder.glob("*.jpg")))
    rounds = take_turns(contenders, rounds=num_rounds, units=units, clock=time.perf_counter)
    return rounds, [(OURS, "in turn", 1.0)]


PARTS = {"network": network, "picture": picture, "folder": whole_folder}


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
