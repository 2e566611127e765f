"""Makes the pretrained model from nothing, and the pictures in this folder that show it at work.

    python assets/make_reader.py

reader.pth    the weights in half precision, with config, recipe and history
plate.png     one drawn plate
reads.png     drawn plates, and what the model reads
ctc.png       how it reads one of them
kinds.png     one plate of each kind, as drawn: two rows stand side by side

Two runs of train.py make it, on drawn plates alone: `python train.py --epochs 48`, and 48 epochs
more from its weights, with half the learning rate and other plates. Together that took 169
minutes on one busy core with AMX. Stopped, the same command goes on where it was.
"""

import io
import os
from pathlib import Path

import plates  # it also makes the scripts above this folder importable
import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.transforms.v2.functional import to_dtype

import data
import model
import predict
import train

ASSETS = Path(__file__).parent
RUNS = (("--epochs", "48"), ("--epochs", "48", "--lr", "1e-3", "--seed", "1"))
# what of a run's arguments the reader keeps: its recipe, and nothing of the machine
RECIPE = ("precision", "seed", "synthetic", "val", "labels", "data", *train.SMALL)

# a row of plates.PLATE_TYPES, and what stands on the plate
KINDS = (
    (0, "皖AX511H"),
    (1, "皖AD12345"),
    (2, "皖AX511H"),
    (2, "皖A1234学"),
    (3, "皖A1234挂"),
    (4, "皖A1234警"),
    (5, "粤Z1234港"),
    (5, "使123456"),
)


def make_reader():
    """Train, or train on, and write reader.pth."""
    paths = [ASSETS / f"run{k}.pth" for k in range(len(RUNS))]
    history = []
    start = []
    for path, options in zip(paths, RUNS):
        if not path.exists() or "resume" in model.load_checkpoint(path)[1]:
            train.main([*options, *start, "--out", str(path), "--resume"])
        content = model.load_checkpoint(path)[1]
        history += content["history"]
        start = ["--init", str(path)]
    weights = {name: value.half() for name, value in content["model"].items()}
    args = {name: content["args"][name] for name in RECIPE}
    file = io.BytesIO()
    torch.save(content | {"model": weights, "args": args, "history": history}, file)
    data.write_file(ASSETS / "reader.pth", file.getvalue())
    for path in paths:
        os.remove(path)


def make_pictures():
    """Write the four pictures: the same plates for every reader."""
    # finer than what the network sees
    images, _ = plates.fixed_plates(60, "pictures", (96, 384))
    data.save_image(ASSETS / "plate.png", to_pil_image(images[20]))
    network = predict.load(device="cpu")
    predict.explain(network, [ASSETS / "plate.png"], ASSETS / "ctc.png")
    reads = predict.read(network, map(to_pil_image, images[::5]))
    captions = [read.plate for read in reads]
    plates.save_sheet(ASSETS / "reads.png", images[::5], captions, 3)
    glyphs = plates.load_glyphs(60)
    kinds = [plates.paint(plates.PLATE_TYPES[k], [text], glyphs)[0] for k, text in KINDS]
    kinds = [to_dtype(image.clamp(0, 1), torch.uint8, scale=True) for image in kinds]
    plates.save_sheet(ASSETS / "kinds.png", kinds, [text for _, text in KINDS], 4)


if __name__ == "__main__":
    with data.one_sentence():
        make_reader()
        make_pictures()
