"""Makes the reader and the pictures in this folder from a checkpoint of `python train.py`.

PYTHONPATH=. python assets/make_reader.py ckpt.pth

reader.pth    the weights in half precision, with the run's arguments and its last scores
plate.png     one synthetic plate
reads.png     synthetic plates, and what the reader reads
ctc.png       how the reader reads one of them
"""

import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

import data
import model as crnn
import predict

ASSETS = Path(__file__).parent
SEED = 2**41  # training's seeds are never this one
SIZE = (96, 384)  # the pictures are finer than what the network sees


def write_reader(checkpoint):
    """Write reader.pth: the checkpoint's weights as float16, which takes half the space."""
    network, info = crnn.load_checkpoint(checkpoint)
    content = crnn.make_checkpoint(network.half(), torch=str(torch.__version__), **info)
    torch.save(content, ASSETS / "reader.pth")


def write_sheet(network, images):
    """Write reads.png: each plate with what was read below it."""
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    reads = predict.read(network, arrays)
    captions = [data.text_picture(result.plate, 44) for result in reads]
    pairs = zip(images, captions)
    pictures = [data.add_captions(image, [caption]) for image, caption in pairs]
    data.save_sheet(pictures, ASSETS / "reads.png", columns=3)


def main(checkpoint):
    write_reader(checkpoint)
    images, _ = next(data.synthetic_batches(60, SEED, SIZE))
    to_pil_image(images[0]).save(ASSETS / "plate.png")
    network = predict.load(ASSETS / "reader.pth", "cpu")
    # every fifth: the plates stand in the order of their types
    write_sheet(network, images[::5])
    predict.explain(network, ASSETS / "plate.png", ASSETS / "ctc.png")


if __name__ == "__main__":
    main(sys.argv[1])
