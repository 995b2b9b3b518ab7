"""The whole network against the C program (golden/darknet), the PyTorch ancestor (golden/darknet_model) and OpenCV."""

import copy
import hashlib
import importlib.util
import json
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.assigners.wh_iou import WhIoU
from models.cfg import parse_cfg, read_cfg
from models.darknet import Darknet
from models.darknet_weights import read_weights, write_weights
from models.losses import Criterion
from models.losses.yolo import YoloLoss
from models.section import CfgError
from utils.boxes import xywh_to_xyxy
from utils.structures import Targets


def resized(cfg, width: int, height: int):
    return cfg.with_options([(cfg.net, "width", width), (cfg.net, "height", height)])


def darknet_view(head, raw: torch.Tensor) -> torch.Tensor:
    """What Darknet's own head layer would put out for our logits [1, A * V, h, w]."""
    values = raw.unflatten(1, (head.num_anchors, head.num_values)).clone()
    obj = head.objectness
    if head.section.type == "region":
        values[:, :, obj] = values[:, :, obj].sigmoid()
        values[:, :, obj + 1 :] = values[:, :, obj + 1 :].softmax(2)
        return values.flatten(1, 2)
    if head.section.flag("new_coords"):
        values = values.sigmoid()
    else:
        values[:, :, [0, 1]], values[:, :, obj:] = values[:, :, [0, 1]].sigmoid(), values[:, :, obj:].sigmoid()
    scale = head.section.float("scale_x_y", 1.0)
    values[:, :, [0, 1]] = values[:, :, [0, 1]] * scale - (scale - 1) / 2
    return values.flatten(1, 2)


def darknet_outputs(model: Darknet, image: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's output as the C program has it: sigmoids in front of new_coords heads, activated heads."""
    with torch.no_grad():
        found = model.layer_outputs(image)
    for index in model.graph.heads:
        raw, before = found[index], model.graph.layers[index].inputs[0]
        found[index] = darknet_view(model.layers[index], raw)
        if model.graph.layers[index].section.flag("new_coords"):
            found[before] = raw.sigmoid()
    return found


@pytest.mark.golden_case("darknet/micro/*.npz")
def test_every_layer_equals_the_c_program(case, tmp_path):
    """In float64, to the agreement that the README of the cases states for float64: 5e-6 of the layer's rms."""
    data = np.load(case)
    # one case has two different filters= on purpose, which is an error of ours but not of Darknet's
    model = Darknet(parse_cfg(str(data["cfg"]), strict=False))
    (tmp_path / "case.weights").write_bytes(data["weights"].tobytes())
    header = read_weights(model, tmp_path / "case.weights")
    found = darknet_outputs(model.double().eval(), torch.from_numpy(data["input"])[None].double())
    assert len(found) == sum(name.startswith("layer") for name in data.files)
    for index, output in enumerate(found):
        wanted = data[f"layer{index}"].astype(np.float64)
        worst = np.abs(output[0].numpy() - wanted).max() / np.sqrt((wanted**2).mean())
        assert worst < 5e-6, f"layer {index}"
    write_weights(model, tmp_path / "again.weights", header)
    assert (tmp_path / "again.weights").read_bytes() == data["weights"].tobytes()


@pytest.mark.golden_case("darknet/parity/*.npz")
def test_whole_networks_equal_the_c_program(case, golden, data_dir, tmp_path):
    """Seeded weights with nearly dead channels, so that another epsilon shows: 4e-5 of each layer's rms, in float32."""
    data, maker = np.load(case), generator(golden)
    path = data_dir / "cfg" / str(data["cfg"])
    width, height, seed = (int(data[name]) for name in ("width", "height", "seed"))
    made = maker.Maker(path, seed, width, height, True)
    weights = tmp_path / "seeded.weights"
    assert made.write(weights, tuple(data["version"]), int(data["seen"]))[1] == str(data["weights_sha256"])
    image = maker.random_input(seed, made.c, height, width)
    assert hashlib.sha256(image.tobytes()).hexdigest() == str(data["input_sha256"])

    model = Darknet(resized(read_cfg(path), width, height))
    assert read_weights(model, weights).seen == int(data["seen"])
    weights.unlink()
    found = darknet_outputs(model.eval(), torch.from_numpy(image)[None])
    assert len(found) == len(data["layer_type"])
    for index, output in enumerate(found):
        assert output.shape[1:] == tuple(data["layer_shape"][index])
        if index in model.graph.heads and str(data["layer_type"][index]) == "region":
            continue  # Darknet keeps this one in another order; head_out below has it in ours
        output = output.numpy().ravel().astype(np.float64)
        at = data["layer_sample_index"][index]
        wanted, rms = data["layer_sample"][index][at >= 0], float(data["layer_rms"][index])
        assert np.abs(output[at[at >= 0]] - wanted).max() < 4e-5 * rms, f"layer {index}"
        assert np.sqrt((output**2).mean()) == pytest.approx(rms, rel=4e-5)
    for head in data["heads"]:
        before = model.graph.layers[head].inputs[0]
        for name, layer in (("raw", before), ("out", head)):
            values, wanted = found[layer].numpy().ravel()[data[f"head{head}_index"]], data[f"head{head}_{name}"]
            assert np.abs(values - wanted).max() < 4e-5 * max(1, np.sqrt((wanted**2).mean())), f"head {head} {name}"


def generator(golden):
    """The seeded maker of weights that lies beside the cases."""
    path = golden / "darknet" / "tools" / "random_darknet_weights.py"
    spec = importlib.util.spec_from_file_location("random_darknet_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ZeroPaddedPool(torch.nn.Module):
    """The ancestor's 2x2 stride-1 pool."""

    def forward(self, x):
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)


def ancestor_network(case, tmp_path):
    data = np.load(case)
    model = Darknet(parse_cfg(str(data["cfg"])))
    (tmp_path / "case.weights").write_bytes(data["weights_file"].tobytes())
    header = read_weights(model, tmp_path / "case.weights")
    write_weights(model, tmp_path / "again.weights", header)
    assert (tmp_path / "again.weights").read_bytes() == data["weights_file"].tobytes()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.momentum == 0.03
            module.eps = 1e-4
    return data, model


def relative(found: torch.Tensor, wanted: np.ndarray) -> float:
    wanted = torch.from_numpy(wanted)
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.golden_case("darknet_model/*.npz")
def test_eval_equals_the_ancestor(case, tmp_path):
    """Where the ancestor's zero-padded pool shows, the case also has its output with Darknet's padding: ours."""
    data, model = ancestor_network(case, tmp_path)
    images = torch.from_numpy(data["x"])
    with torch.no_grad():
        preds = model.eval().predict(images)
    wanted = data["alt_eval_io_minus_inf_pad" if "alt_eval_io_minus_inf_pad" in data else "eval_io"]
    low, high = preds.boxes[..., :2], preds.boxes[..., 2:]
    assert relative(torch.cat([(low + high) / 2, high - low], -1), wanted[..., :4]) < 1e-4
    assert relative(preds.obj.sigmoid(), wanted[..., 4]) < 1e-4
    assert relative(preds.cls.sigmoid(), wanted[..., 5:]) < 1e-4


@pytest.mark.golden_case("darknet_model/*.npz")
def test_training_mode_equals_the_ancestor(case, tmp_path):
    """With the ancestor's own pool put in: raw maps, losses, the gradient of every parameter, running statistics."""
    data, model = ancestor_network(case, tmp_path)
    hyp, images = json.loads(str(data["meta"]))["hyp"], torch.from_numpy(data["x"])
    for index, spec in enumerate(model.graph.layers):
        if spec.section.type == "maxpool" and (spec.section.int("size"), spec.section.int("stride")) == (2, 1):
            model.layers[index] = ZeroPaddedPool()
    outputs = model.train()(images)
    for number, (head, raw) in enumerate(zip(model.heads, outputs)):
        values = raw.unflatten(1, (head.num_anchors, head.num_values)).permute(0, 1, 3, 4, 2)
        assert relative(values, data[f"train_p{number}"]) < 1e-4

    height, width = images.shape[2:]
    rows = torch.from_numpy(data["targets"])
    boxes = xywh_to_xyxy(rows[:, 2:] * torch.tensor([width, height, width, height]))
    targets = Targets.of(rows[:, 0].long(), rows[:, 1].long(), boxes)
    gains = {"box": hyp["giou"], "obj": hyp["obj"], "cls": hyp["cls"] * 80 / model.num_classes}
    criterion = Criterion(WhIoU(iou_t=hyp["iou_t"]), YoloLoss(num_classes=model.num_classes, gr=1.0, **gains))
    terms = criterion(model.decode(outputs, (height, width)), targets)
    total = sum(terms.values())
    found = torch.stack([terms["box"], terms["obj"], terms["cls"], total]).detach()
    torch.testing.assert_close(found, torch.from_numpy(data["loss_items"]), rtol=1e-4, atol=1e-5)
    total.backward()
    own = model.state_dict() | {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    names = {"grad/": "grad ", "after/": ""}
    checked = 0
    for prefix, ours in names.items():
        for name in (name for name in data.files if name.startswith(prefix) and "num_batches" not in name):
            own_name = name.replace(prefix, ours).replace("module_list", "layers").replace("BatchNorm2d", "norm")
            assert relative(own[own_name.replace("Conv2d", "conv")], data[name]) < 1e-4, name
            checked += 1
    assert checked > 30


def test_every_cfg_builds_and_its_layers_make_what_the_graph_says(data_dir):
    """All bundled cfgs that the compiler accepts, at their own size; shapes only, no arithmetic."""
    built, refused, seen = [], [], set()
    for path in sorted((data_dir / "cfg").glob("*.cfg")):
        try:
            with torch.device("meta"):
                model = Darknet(read_cfg(path))
        except CfgError:
            refused.append(path.name)
            continue
        built.append(path.name)
        stored = sum(a.numel() for layer in model.layers for a in getattr(layer, "darknet_arrays", dict)().values())
        assert stored == sum(spec.floats for spec in model.graph.layers), path.name
        structure = tuple((spec.section.type, spec.inputs, spec.shape[0]) for spec in model.graph.layers)
        if structure in seen:
            continue  # many cfgs differ in keys of the training only
        seen.add(structure)
        image = torch.empty(1, model.channels, *model.size, device="meta")
        outputs = model.eval().layer_outputs(image)
        if model.heads:
            preds = model.decode([outputs[index] for index in model.graph.heads], model.size)
            assert preds.cls.shape == (1, len(preds.priors), model.num_classes), path.name
        for spec, output in zip(model.graph.layers, outputs):
            assert tuple(output.shape[1:]) == spec.shape, f"{path.name} layer {spec.index} [{spec.section.type}]"
    assert "yolov4-p6.cfg" in built and "Gaussian_yolov3_BDD.cfg" in built and "enet-coco.cfg" in built
    assert len(built) >= 70
    yolo = [p.name for p in (data_dir / "cfg").glob("*.cfg") if "yolo]" in p.read_text(errors="replace")]
    assert len(yolo) >= 42 and not set(yolo) & set(refused)


DIFFERENT = ("yolov2-tiny", "yolov3-tiny_xnor", "yolov3-tiny_occlusion_track", "yolov4-tiny_contrastive", "enet-coco")


@pytest.mark.parametrize("name", [*DIFFERENT, "yolov4-csp-s-mish", "tiny"])
def test_networks_run_and_learn(data_dir, name):
    """Forward, decode and backward with real numbers: finite everywhere, a gradient for every parameter."""
    cfg = read_cfg(data_dir / "cfg" / f"{name}.cfg")
    model = Darknet(cfg)
    size = 2 * model.stride if model.graph.heads else 64
    images = torch.rand(2, model.channels, size, size)
    outputs = model.train()(images)
    if model.graph.heads:
        preds = model.decode(outputs, (size, size))
        assert preds.boxes.isfinite().all() and preds.boxes.shape[:2] == preds.obj.shape
        assert preds.cls.shape[-1] == model.num_classes == cfg.layers[model.graph.heads[0]].int("classes")
    sum(output.square().sum() for output in outputs).backward()
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert name == "yolov4-tiny_contrastive"  # the branch of its embedding is no head's
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


TWO_HEADS = """
[net]
width=64
height=32
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=4
pad=1
activation=leaky
[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=mish
[convolutional]
filters=24
size=1
activation=linear
[yolo]
mask=3,4,5
anchors=4,5, 9,8, 15,20, 30,28, 25,60, 60,50
classes=3
num=6
thresh=0.000001
[route]
layers=-3
[upsample]
stride=2
[route]
layers=0
groups=2
group_id=1
[route]
layers=-1,-2
[convolutional]
filters=24
size=1
activation=linear
[yolo]
mask=0,1,2
anchors=4,5, 9,8, 15,20, 30,28, 25,60, 60,50
classes=3
num=6
thresh=0.000001
"""


def spread(model: Darknet) -> Darknet:
    """Random numbers in everything that starts as a constant."""
    rng = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 1.5, generator=rng)
            torch.nn.init.uniform_(module.weight, 0.6, 1.4, generator=rng)
            torch.nn.init.normal_(module.bias, 0, 0.3, generator=rng)
    for head in model.graph.heads:
        bias = model.layers[model.graph.layers[head].inputs[0]].conv.bias
        torch.nn.init.normal_(bias, 0, 0.5, generator=rng)
    return model.eval()


def opencv_outputs(cfg_path, weights_path, image: np.ndarray) -> list[np.ndarray]:
    """Per head [anchors * rows * columns, 5 + classes]: relative center and size, objectness, scores; in our order."""
    net = cv2.dnn.readNetFromDarknet(str(cfg_path), str(weights_path))
    net.setInput(image)
    return net.forward(net.getUnconnectedOutLayersNames())


@pytest.mark.parametrize("name", ["two_heads", "yolov3-tiny"])
def test_opencv_reads_what_we_write_and_sees_the_same(name, request, tmp_path):
    if name == "two_heads":
        cfg = parse_cfg(TWO_HEADS)
    else:
        cfg = read_cfg(request.getfixturevalue("data_dir") / "cfg" / "yolov3-tiny.cfg")
        heads = [section for section in cfg.layers if section.type == "yolo"]
        cfg = resized(cfg, 160, 96).with_options([(head, "thresh", "0.000001") for head in heads])
    model = spread(Darknet(cfg))
    (tmp_path / "net.cfg").write_text(model.cfg.text)
    write_weights(model, tmp_path / "net.weights")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-6  # OpenCV's
    image = np.random.default_rng(0).random((1, 3, *model.size), np.float32)
    with torch.no_grad():
        preds = model.predict(torch.from_numpy(image))
    scores = preds.obj.sigmoid()[..., None] * preds.cls.sigmoid()
    low, high = preds.boxes[0, :, :2], preds.boxes[0, :, 2:]
    relative_size = torch.tensor(model.size[::-1])
    ours = torch.cat([(low + high) / 2 / relative_size, (high - low) / relative_size, scores[0]], 1)
    for grid, theirs in zip(preds.priors.grids, opencv_outputs(tmp_path / "net.cfg", tmp_path / "net.weights", image)):
        mine = ours[grid.slots].view(grid.anchors, -1, ours.shape[1]).transpose(0, 1).flatten(0, 1)
        theirs = torch.from_numpy(theirs)[:, [0, 1, 2, 3, *range(5, theirs.shape[1])]]
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-4)


def test_a_copy_is_independent_and_shares_within_itself(tmp_path):
    body = (
        "[net]\nwidth=8\nheight=8\nchannels=4\n[convolutional]\nfilters=4\n[convolutional]\nfilters=4\nshare_index=0\n"
    )
    model = Darknet(parse_cfg(body))
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.layers[0].conv.weight)
    image = torch.rand(1, 4, 8, 8)
    assert (twin(image)[0] == 0.5).all() and not (model(image)[0] == 0.5).any()


def test_fused_network_sees_the_same_and_is_not_saved(tmp_path):
    model = spread(Darknet(parse_cfg(TWO_HEADS))).double()
    fused, images = model.fuse(), torch.rand(2, 3, 32, 64, dtype=torch.float64)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    for ours, wanted in zip(fused(images), model(images)):
        torch.testing.assert_close(ours, wanted)
    with pytest.raises(AssertionError, match="fused"):
        write_weights(fused, tmp_path / "fused.weights")


def test_memory_format_size_and_type_do_not_matter():
    model = spread(Darknet(parse_cfg(TWO_HEADS)))
    images = torch.rand(2, 3, 64, 96)
    wanted = model(images)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)(
        images.contiguous(memory_format=torch.channels_last)
    )
    for ours, theirs in zip(last, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert all(output.dtype == torch.float64 for output in copy.deepcopy(model).double()(images.double()))
    assert [tuple(output.shape[2:]) for output in wanted] == [(8, 12), (16, 24)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_decode_in_float32(dtype):
    model = spread(Darknet(parse_cfg(TWO_HEADS)))
    images = torch.rand(2, 3, 32, 64)
    with torch.no_grad():
        wanted, found = model.predict(images), copy.deepcopy(model).to(dtype).predict(images.to(dtype))
    assert found.boxes.dtype == found.obj.dtype == torch.float32
    assert (found.obj - wanted.obj).abs().max() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_sees_the_same_as_the_cpu():
    model = spread(Darknet(parse_cfg(TWO_HEADS))).double()
    images = torch.rand(2, 3, 32, 64, dtype=torch.float64)
    wanted, found = model.predict(images), copy.deepcopy(model).cuda().predict(images.cuda())
    for name in ("boxes", "obj", "cls"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(wanted, name))


def test_facts_about_a_network():
    model = Darknet(parse_cfg(TWO_HEADS))
    assert (model.size, model.channels, model.num_classes, model.stride) == ((32, 64), 3, 3, 8)
    assert len(model.heads) == 2
    bias = model.layers[2].conv.bias.view(3, 8)
    assert (bias[:, :4] == 0).all() and (bias[:, 4] == -4.5).all()
    torch.testing.assert_close(bias[:, 5:], torch.full((3, 3), float(np.log(0.6 / (3 - 0.99)))))
    heads = {index: weak for index, weak in enumerate(model._done) if weak}
    assert sorted(source for sources in heads.values() for source in sources) == [0, 1, 2, 4, 5, 6, 7, 8]


def test_outputs_are_forgotten_after_their_last_reader():
    """At most the image, the kept head and two maps are alive in a long chain."""
    chain = "[convolutional]\nfilters=4\nsize=3\npad=1\n" * 20
    model = Darknet(parse_cfg("[net]\nwidth=8\nheight=8\nchannels=4\n" + chain)).eval()
    walk, alive = model._walk(torch.rand(1, 4, 8, 8), range(20)), []
    for _ in walk:
        alive.append(len(walk.gi_frame.f_locals["outputs"]))
    assert max(alive) <= 3


NEW_COORDS = "[net]\nwidth=8\nheight=8\nchannels=4\n{}[yolo]\nanchors=1,1\nnum=1\nmask=0\nclasses=1\nnew_coords=1\n{}"


def test_the_sigmoid_of_new_coords_belongs_to_the_head():
    body = "[convolutional]\nfilters=6\nactivation=logistic\n"
    model = Darknet(parse_cfg(NEW_COORDS.format(body, "")))
    torch.nn.init.constant_(model.layers[0].conv.bias, 50.0)
    assert model(torch.rand(1, 4, 8, 8))[0].min() > 2


def test_new_coords_that_cannot_be_moved_are_refused_with_the_line():
    with pytest.raises(CfgError, match="activation=logistic"):
        Darknet(parse_cfg(NEW_COORDS.format("[convolutional]\nfilters=6\nactivation=linear\n", "")))
    shared = NEW_COORDS.format("[convolutional]\nfilters=6\nactivation=logistic\n", "[route]\nlayers=0\n")
    with pytest.raises(CfgError, match=r":13: .*own"):
        Darknet(parse_cfg(shared))


@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile needs a C compiler")
def test_the_walk_compiles_without_a_break():
    model = Darknet(parse_cfg(TWO_HEADS)).eval()
    images = torch.rand(1, 3, 32, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ours, wanted in zip(compiled(images), model(images)):
        torch.testing.assert_close(ours, wanted)
