"""Makes the pretrained model and the pictures in this folder from checkpoints of train.py.

    python assets/make_reader.py ckpt.pth [MORE.pth ...]

reader.pth    the weights in half precision, with the run's arguments and history
plate.png     one drawn plate
reads.png     drawn plates, and what the model reads
ctc.png       how it reads one of them

Several checkpoints that were trained on from the same weights become one: see `average`.

The repository's checkpoint comes from four runs on drawn plates, each from the weights of the one
before: `python train.py --model wide --batch-size 64`, `python train.py --init ckpt.pth --epochs 48
--batch-size 64 --seed 1`, `python train.py --init ckpt.pth --epochs 34 --seed 2` and `python
train.py --init ckpt.pth --epochs 24 --seed 3`. It is the mean of the last two. The first three had
earlier drawings and cameras (see the history of data.py), and saved an EMA of the weights, which
train.py no longer keeps: at the end of a run it was no better.
"""

import sys
from pathlib import Path

import plates  # it also makes the scripts above this folder importable
import torch
from torch.optim.swa_utils import update_bn
from torchvision.transforms.functional import to_pil_image

import data
import model
import predict

ASSETS = Path(__file__).parent


def average(checkpoints):
    """The content of the last of several checkpoints, with the mean of the weights of all.

    Runs that start from the same weights end in one wide valley of the loss, and their mean lies
    nearer to its bottom than each of them (model soups; Wortsman et al., 2022, arXiv:2203.05482).
    The batch-norms' statistics are measured anew, on drawn plates."""
    contents = [model.load_checkpoint(path)[1] for path in checkpoints]
    content = contents[-1]
    weights = {
        name: torch.stack([other["model"][name].float() for other in contents]).mean(0)
        for name in content["model"]
    }
    network = model.build_network(**content["config"])
    network.load_state_dict(weights)
    if len(contents) > 1:
        data.seed_all("batch-norm")
        size = content["config"]["size"]
        batches = (plates.draw_plates(64, size, plates.PRACTICE)[0] for _ in range(100))
        update_bn(batches, network)
    return content | {"model": network.state_dict()}


def main(checkpoints):
    content = average(checkpoints)
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
        main(sys.argv[1:])
