"""Makes the pretrained model and the pictures in this folder from a checkpoint of train.py.

    python assets/make_reader.py ckpt.pth

reader.pth    the weights in half precision, with the run's arguments and history
plate.png     one drawn plate
reads.png     drawn plates, and what the model reads
ctc.png       how it reads one of them

The repository's checkpoint comes from three runs on drawn plates, each from the weights of the one
before: `python train.py --model wide --batch-size 64`, `python train.py --init ckpt.pth --epochs 48
--batch-size 64 --seed 1` and `python train.py --init ckpt.pth --epochs 34 --seed 2`, all with
earlier drawings and cameras (see the history of data.py). All three saved an EMA of the weights,
which train.py no longer keeps: at the end of a run it was no better.
"""

import sys
from pathlib import Path

import plates  # it also makes the scripts above this folder importable
import torch
from torchvision.transforms.functional import to_pil_image

import data
import model
import predict

ASSETS = Path(__file__).parent


def main(checkpoint):
    _, content = model.load_checkpoint(checkpoint)
    content["model"] = {name: value.half() for name, value in content["model"].items()}
    torch.save(content, ASSETS / "reader.pth")

    # finer than what the network sees, and the same pictures for every checkpoint
    images, _ = plates.fixed_plates(60, "pictures", (96, 384))
    to_pil_image(images[20]).save(ASSETS / "plate.png")
    network = predict.load(device="cpu")
    predict.explain(network, [ASSETS / "plate.png"], ASSETS / "ctc.png")
    reads = predict.read(network, map(to_pil_image, images[::5]))
    captions = [read.plate for read in reads]
    plates.save_sheet(ASSETS / "reads.png", images[::5], captions, 3)


if __name__ == "__main__":
    with data.one_sentence():
        main(sys.argv[1])
