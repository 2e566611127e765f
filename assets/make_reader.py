"""Makes the pretrained model and the pictures in this folder from a checkpoint of train.py.

    python assets/make_reader.py ckpt.pth

reader.pth    the weights in half precision, with the run's arguments and history
plate.png     one drawn plate
reads.png     drawn plates, and what the model reads
ctc.png       how it reads one of them

The repository's checkpoint comes from two runs on drawn plates,
`python train.py --model wide --batch-size 64` and from there
`python train.py --init ckpt.pth --epochs 48 --batch-size 64 --seed 1`. Both had earlier cameras;
that of the second was out of focus more often than the present one. In data.py, blur():
across = 0.15 + pixels * 2.2 * r**4, along = across + pixels * 4.5 * r**5, r being
random.random(); photograph(): 0.68 in place of 0.55; warp():
tight = rand(count, 2, 1, 1) ** pair(2, 1), and
zoom = 1 + strength * (pair(0.27, 0.60) * tight - pair(0.08, 0.15)).
"""

import io
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
    file = io.BytesIO()
    torch.save(content, file)
    data.write_file(ASSETS / "reader.pth", file.getvalue())

    # finer than what the network sees, and the same pictures for every checkpoint
    images, _ = plates.fixed_plates(60, "pictures", (96, 384))
    to_pil_image(images[0]).save(ASSETS / "plate.png")
    network = predict.load(device="cpu")
    predict.explain(network, [ASSETS / "plate.png"], ASSETS / "ctc.png")
    reads = predict.read(network, map(to_pil_image, images[::5]))
    captions = [read.plate for read in reads]
    plates.save_sheet(ASSETS / "reads.png", images[::5], captions, 3)


if __name__ == "__main__":
    with data.one_sentence():
        main(sys.argv[1])
