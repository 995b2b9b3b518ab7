"""The second opinion of a real network: what it says about labels that were changed on purpose."""

import json

import pytest

from models.doctor import main
from utils.errors import UserError

PICTURES = ("000000000025.jpg", "000000000081.jpg", "000000000154.jpg", "000000000502.jpg")
PLANE, DOG, ZEBRA = 5, 18, 24  # COCO's ids


def changed_set(data_dir, folder):
    """Some pictures of COCO, their airplane called a dog, their zebras without boxes."""
    source = json.loads((data_dir / "coco-mini/instances.json").read_text())
    images = [image for image in source["images"] if image["file_name"] in PICTURES]
    ids = {image["id"] for image in images}
    annotations = [one for one in source["annotations"] if one["image_id"] in ids and one["category_id"] != ZEBRA]
    for annotation in annotations:
        annotation["category_id"] = {PLANE: DOG}.get(annotation["category_id"], annotation["category_id"])
    assert len(images) == len(PICTURES)
    for image in images:
        image["file_name"] = str(data_dir / "coco-mini/images" / image["file_name"])
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": source["categories"]}))
    return file


def test_a_network_finds_what_was_changed(data_dir, tmp_path, capsys):
    file = changed_set(data_dir, tmp_path)
    weights = data_dir / "weights/yolo-fastest-1.1-xl.weights"
    flags = ["--weights", str(weights), "--cfg", str(weights.with_suffix(".cfg")), "--device", "cpu"]
    main([str(file), *flags, "--project", str(tmp_path / "runs")])
    said = capsys.readouterr().out
    missed, swapped = (said.partition(title)[2].partition("->")[0] for title in ("have no box", "another class"))
    assert missed.count("000000000154.jpg: zebra") == 3
    assert "000000000081.jpg: labelled dog, found airplane" in swapped
    page = (tmp_path / "runs/exp/report.html").read_text()
    assert "objects found that have no box" in page and page.count("data:image/jpeg") >= 3


def test_bad_input_is_one_line(data_dir, tmp_path):
    file = changed_set(data_dir, tmp_path)
    with pytest.raises(UserError, match="no such weights file"):
        main([str(file), "--weights", "nowhere.weights"])
    with pytest.raises(UserError, match="no such data set"):
        main([str(tmp_path / "nowhere"), "--weights", "nowhere.weights"])
