"""Read licence plates from image files.

    python predict.py ckpt.pth crop.jpg                     # path, plate and confidence, tab-separated
    python predict.py ckpt.pth FOLDER "more/*.png"          # folders and quoted patterns
    python predict.py ckpt.pth crop.jpg --explain ctc.png   # how CTC came to its answer, as a picture
    python predict.py ckpt.pth --export model.onnx          # for use without these files

In Python:

    from predict import load, read
    model = load("ckpt.pth")
    plates = list(read(model, ["crop.jpg", array]))          # [("皖AX511H", 0.998), ...]

It reads crops of one plate each; a detector comes before it.
"""
import argparse
import glob
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

import data
import model as crnn
from evaluate import plate_forms, read, reading_options


def load(path, device="auto"):
    """A checkpoint of train.py or of the notebook as a network ready to read. Raises ValueError if it is none."""
    model, _ = crnn.load_checkpoint(path, data.ALPHABET, crnn.pick_device(device))
    return model.fold()


def find(arguments):
    """The image files that paths, folders and patterns name, in the order given, those of a folder or pattern sorted."""
    for argument in arguments:
        if os.path.isdir(argument):
            yield from data.list_images(argument)
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            yield from sorted(Path(p) for p in glob.glob(argument, recursive=True) if Path(p).suffix.lower() in data.IMAGES) or [Path(argument)]
        else:
            yield Path(argument)


def explain(model, path, out, precision="auto"):
    """Write a picture of CTC at work on one image: the crop, the time steps under it with the character that each spells
    (blanks as dots, taller where surer), the collapsed string with its probability, and the runners-up."""
    image = data.read_image(path, model.config["size"])
    logits = crnn.predict_logits(model, image[None], crnn.pick_precision(precision, next(model.parameters()).device)).cpu()
    probs, steps = logits[:, 0].softmax(1), len(logits)
    cell = 28                                                   # pixels a time step, so that a column stands under its pixels
    width, alphabet = cell * steps, model.config["alphabet"]
    crop = to_pil_image(image).resize((width, width * image.shape[1] // image.shape[2]), Image.BILINEAR)
    page = Image.new("RGB", (width, crop.height + 330), "white")
    page.paste(crop)
    draw, floor = ImageDraw.Draw(page), crop.height + 150
    place = lambda text, x, y, high, colour=(0, 0, 0): page.paste(to_pil_image(data.text_picture(text, high, [colour] * len(text))), (x, y))
    for t, (p, k) in enumerate(zip(*(x.tolist() for x in probs.max(1)))):
        x, colour = t * cell, (170, 170, 170) if k == crnn.BLANK else (30, 90, 200)
        draw.rectangle((x + 3, floor - round(p * 130), x + cell - 4, floor), fill=colour)
        if k == crnn.BLANK:
            draw.ellipse((x + cell // 2 - 2, floor + 20, x + cell // 2 + 2, floor + 24), fill=colour)
        else:
            draw.line((x + cell // 2, 0, x + cell // 2, crop.height), fill=(255, 220, 0))
            place(alphabet[k - 1], x + 5, floor + 6, 32)
    for row, (text, p) in enumerate(crnn.candidates(logits, alphabet, plate_forms(model))[0][:4]):
        x, y, high = (8, floor + 52, 44) if row == 0 else (8 + (row - 1) * width // 3, floor + 118, 28)
        place(text, x, y, high, (0, 0, 0) if row == 0 else (120, 120, 120))
        draw.text((x + len(text) * (high // 2 + 2) + high // 3, y + high // 4), f"{p:.4f}", (120, 120, 120), ImageFont.load_default(high // 2))
    page.save(out)


def export(model, out):
    """Write the network for use without these files, uint8 (B, 3, H, W) in and logits (T, B, C) out for any B, and check that
    it computes the same: .pt2 by torch.export, .onnx by torch.onnx. Alphabet and size go along as metadata."""
    images = torch.randint(0, 256, (2, 3, *model.config["size"]), dtype=torch.uint8)
    facts = {"alphabet": model.config["alphabet"], "size": " ".join(map(str, model.config["size"])), "blank": str(crnn.BLANK)}
    model, some = model.cpu(), torch.randint(0, 256, (5, 3, *model.config["size"]), dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    if out.endswith(".onnx"):
        try:
            program = torch.onnx.export(model, (images,), input_names=["images"], output_names=["logits"], dynamic_shapes=batch, dynamo=True)
            program.model.metadata_props.update(facts)
            answer = program(some)[0]               # by onnxruntime
        except ImportError as error:
            raise ValueError(f"{out}: needs {error.name}; install all with: pip install onnx onnxscript onnxruntime") from None
        program.save(out)
    elif out.endswith(".pt2"):
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=batch), out, extra_files={"facts.json": json.dumps(facts)})
        answer = torch.export.load(out).module()(some)
    else:
        raise ValueError(f"{out}: name it .pt2 or .onnx")
    with torch.no_grad():
        apart = (answer - model(some)).abs().max().item()
    if apart > 1e-3:
        raise ValueError(f"{out}: its output is {apart:.1e} away from the network's; do not use it")
    print(f"{out}: written; agrees with the network to {apart:.1e}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, folders, quoted patterns")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="print the K likeliest strings, each with its probability")
    parser.add_argument("--explain", metavar="OUT.png", help="draw how the first image was read")
    parser.add_argument("--export", metavar="OUT", help="write the network as .pt2 or .onnx")
    reading_options(parser)
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(encoding="utf8", errors="surrogateescape")
    crnn.keep_memory()
    try:
        model, paths = load(args.checkpoint, args.device), list(find(args.paths))
        if not paths and not args.export:
            raise ValueError(f"{' '.join(args.paths) or 'PATH'}: no images there; name files, folders or quoted patterns")
        if args.explain:
            explain(model, paths[0], args.explain, args.precision)
        if args.export:
            export(model, args.export)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    failed, start = 0, time.time()
    answers = read(model, paths, args.precision, args.grammar, args.top, workers=args.workers)
    for path, answer in data.progress(zip(paths, answers), len(paths), "image"):
        if answer[0] is None:
            failed += 1
            print(f"error: {answer[1]}", file=sys.stderr)
        else:
            name = str(path).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
            print(name, *(f"{plate}\t{p:.4f}" for plate, p in (answer if args.top > 1 else [answer])), sep="\t")
    if paths:
        done = len(paths) - failed
        print(f"{done:,} read, {failed:,} unreadable, {done / (time.time() - start):.0f} images/s", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                  # `| head` ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
