"""Train a licence-plate reader with CTC loss, on drawn plates, on your crops, or on both.

    python train.py                                         # no data at all: plates drawn on the fly
    python train.py --data DIR                              # labelled crops (DIR/train, or DIR itself), drawn plates mixed in
    python train.py --data CCPD2019-dl1 --epochs 5
    python train.py --data CCPD2019-dl1 --epochs 5 --model notebook      # the notebook's own network and recipe
    torchrun --nproc-per-node 8 train.py --data CCPD2019-dl1 --epochs 5  # eight GPUs

The best weights go to ckpt.pth, what --resume needs to ckpt.state.pth, the history to ckpt.csv.
"""
import argparse
import copy
import csv
import math
import os
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import evaluate
import model as crnn

# What each preset trains with unless told otherwise; the notebook's are the notebook's own.
RECIPES = {"small": dict(epochs=32, lr=2e-3, weight_decay=0.02, synthetic=0.5, augment=True),
           "notebook": dict(epochs=5, lr=3e-4, weight_decay=1e-4, synthetic=0.0, augment=False)}
EPOCH = 20_000                                      # images an epoch has at least: small sets are repeated
GREEN, ODD = 0.02, 0.33                            # shares of the drawn plates: see data.random_plates
LOG_EVERY, LOG_SECONDS = 100, 30                    # a line every so many steps, or seconds where steps are slow
BAD_STEPS = 30                                      # non-finite steps in a row that end a run
FREE_TO_CHANGE = {"resume", "out", "workers", "device"}     # arguments that a resumed run may have otherwise


def seed_of(*numbers):
    """One seed for a tuple of counters, so that every step's randomness follows from where it stands, not from what ran before."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def split_validation(texts, share):
    """Indices (train, val): about `share` of the plates, chosen by a hash of the string, so that none is on both sides."""
    plates = sorted(set(texts), key=lambda text: zlib.crc32(text.encode()))
    chosen = set(plates[:round(share * len(plates)) or (share > 0 and len(plates) > 1)])
    return [k for k, t in enumerate(texts) if t not in chosen], [k for k, t in enumerate(texts) if t in chosen]


def learning_rate(step, steps, args):
    """Linear warm-up, then a half cosine down to nothing (Loshchilov and Hutter, 2017); constant for the notebook."""
    if args.model == "notebook":
        return args.lr
    warm = min(300, steps // 5)
    return args.lr * min((step + 1) / (warm + 1), 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


@torch.no_grad()
def average(ema, model, share):
    """Move the averaged weights and batch-norm statistics by `share` towards the model's."""
    for a, b in zip(ema.state_dict().values(), model.state_dict().values()):
        if a.is_floating_point():
            a.lerp_(b, share)


def province_prior(texts, alphabet):
    """(len(alphabet) + 1,) float32: how much likelier than usual each province is among `texts`, as a logarithm; 0 for the rest.

    Training adds it to the logits of crops and reading goes without it, so that the network learns what a province looks
    like and not how many photographs came from there (logit adjustment; Menon et al., 2021, arXiv:2007.07314)."""
    counts = Counter(text[:1] for text in texts)
    counts = torch.tensor([0.0] + [(counts[char] + 0.001 * len(texts)) * (char in data.PROVINCES) for char in alphabet])
    share = counts / counts.sum()
    return torch.where(share > 0, share.log() + torch.special.entr(share).sum(), 0)


def batch_loss(logits, texts, alphabet):
    """The mean over images of the CTC loss a character, the scalar that torch's reduction="mean" gives."""
    lengths = torch.tensor([max(1, len(text)) for text in texts], device=logits.device)
    return (crnn.text_loss(logits, texts, alphabet) / lengths).mean()


@torch.no_grad()
def make_batch(images, texts, drawn, size, generator, glyphs, augment):
    """One training batch on the generator's device: crops (uint8 or None), photographed anew if asked, and `drawn` plates."""
    parts = []
    if images is not None:
        images = images.to(generator.device, non_blocking=True)
        parts.append(data.camera(images, size, generator, data.GENTLE) if augment else images)
    if drawn:
        plates, words = data.draw_plates(drawn, size, generator, glyphs, GREEN, ODD)
        parts, texts = parts + [plates], texts + words
    return torch.cat(parts), texts


def validate(model, dataset, val_ids, precision, rank, world):
    """(metrics, mean CTC loss a character) of all processes on the validation crops, or without crops on drawn plates."""
    batches = ()
    if dataset:
        batches = data.loader(dataset, data.in_batches(val_ids[rank::world], 256))
    elif rank == 0:
        batches = evaluate.drawn_batches(*evaluate.DRAWN_VAL, model.config["size"])
    if world > 1:                                   # ranks saw other images, so their batch-norm statistics differ
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    results = evaluate.read_batches(model.eval(), batches, precision)
    if world > 1:
        shards = [None] * world
        dist.all_gather_object(shards, results)
        results = [sum(column, []) for column in zip(*shards)]
    trues, preds, _, losses = results
    return evaluate.metrics(trues, preds), float(np.mean(losses or [math.nan]))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with train inside, or of labelled crops (default: drawn plates alone)")
    add("--out", default="ckpt.pth", help="checkpoint to write (default: %(default)s)")
    add("--model", default="small", choices=list(RECIPES), help="network (default: %(default)s)")
    add("--rnn", default="lstm", choices=["lstm", "gru"], help="recurrent layer (default: %(default)s)")
    add("--bidirectional", action=argparse.BooleanOptionalAction, help="read both ways (default: small yes, notebook no)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="image size (default: small 32 128, notebook 96 448)")
    add("--alphabet", help="the characters of other people's plates, or a file that holds them (default: Chinese plates)")
    add("--epochs", type=int, help="passes over the files, of 20,000 images at least (default: small 32, notebook 5)")
    add("--batch-size", type=int, default=128, help="images a step, over all processes (default: %(default)s)")
    add("--lr", type=float, help="highest learning rate (default: small 2e-3, notebook 3e-4)")
    add("--weight-decay", type=float, help="(default: small 0.02, notebook 1e-4)")
    add("--synthetic", type=float, metavar="F", help="share of each batch that is drawn (default: small 0.5, notebook 0; 1 without --data)")
    add("--augment", action=argparse.BooleanOptionalAction, help="photograph the crops anew (default: small yes, notebook no)")
    add("--val", type=float, default=0.05, metavar="F", help="share of the training plates that chooses the best weights (default: %(default)s)")
    add("--workers", type=int, help="threads that decode files (default: one a core)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the fastest the device computes)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--init", metavar="CKPT", help="start from these weights (fine-tune)")
    add("--resume", action="store_true", help="go on after the last complete epoch of --out")
    args = parser.parse_args(argv)
    for name, value in RECIPES[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.alphabet:
        path = Path(args.alphabet)
        args.alphabet = "".join(dict.fromkeys((path.read_text("utf8") if path.is_file() else args.alphabet).split("\n")[0].strip()))
        args.synthetic = 0.0
    args.synthetic = args.synthetic if args.data else 1.0
    if not 0 <= args.synthetic <= 1 or not 0 <= args.val < 1 or args.batch_size < 2 or args.epochs < 1:
        parser.error("--synthetic and --val are shares from 0 to 1, --batch-size is at least 2 and --epochs at least 1")
    if not args.data and args.alphabet:
        parser.error("--alphabet: only Chinese plates can be drawn; give labelled crops with --data")
    return args


def main(argv=None):
    args = parse(argv)
    # a batch queue or a spot machine ends a run with SIGTERM; Ctrl-C is SIGINT
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    crnn.keep_memory()
    try:
        train(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join_processes(args):
    """(rank, number of processes, device) of this one; torchrun sets the environment that says so."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = crnn.pick_device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def check_writable(out):
    """Raise ValueError now, not after the first epoch, where `out` cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        if out.is_dir():
            raise OSError(0, "it is a folder")
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None


def build(args, device):
    """The network on its device, new or from --init, and its optimizer."""
    alphabet = args.alphabet or data.ALPHABET
    if args.init:
        model, _ = crnn.load_checkpoint(args.init, data.ALPHABET)
        if model.config["alphabet"] != alphabet:
            raise ValueError(f"{args.init}: its alphabet is another one; give the same with --alphabet")
    else:
        model = crnn.CRNN(alphabet, args.model, args.size, args.rnn, args.bidirectional)
    model.to(device, memory_format=torch.channels_last)
    if args.model == "notebook":
        return model, torch.optim.Adam(model.parameters(), args.lr, amsgrad=True, weight_decay=args.weight_decay)
    return model, torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=device.type != "mps")


def load_crops(args, model, rank):
    """The labelled crops of --data whose labels fit the network: (PlateDataset, indices to train on, indices to validate on)."""
    paths, texts = data.find_crops(data.split_folder(args.data, "train"), model.config["alphabet"], quiet=rank > 0)
    fits = [k for k, text in enumerate(texts) if crnn.steps_needed(text) <= model.steps]
    if len(fits) < len(texts) and rank == 0:
        print(f"warning: {len(texts) - len(fits):,} labels need more than the {model.steps} time steps of this size; left out", file=sys.stderr)
    dataset = data.PlateDataset([paths[k] for k in fits], [texts[k] for k in fits], model.config["size"], args.workers)
    train_ids, val_ids = split_validation(dataset.texts, args.val)
    if not train_ids:
        raise ValueError(f"{args.data}: no crops are left to train on; add some, or lower --val")
    return dataset, train_ids, val_ids


def read_state(path, args):
    """What an earlier run with the same arguments saved after its last whole epoch."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["args"]
    except Exception as error:                      # torch.load raises all sorts for broken files
        raise ValueError(f"{path}: not a whole state of train.py ({str(error).splitlines()[0][:80]}); drop --resume to start anew") from None
    for name, value in vars(args).items():
        if name not in FREE_TO_CHANGE and before.get(name) != value:
            raise ValueError(f"{path}: that run had --{name.replace('_', '-')} {before.get(name)}, this one {value}; give the same or drop --resume")
    return state


def train(args):
    """The whole run. Raises ValueError or OSError with one sentence where the user can mend something."""
    rank, world, device = join_processes(args)
    say = print if rank == 0 else lambda *_, **__: None
    precision = crnn.pick_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    out, state_path = Path(args.out), Path(args.out).with_suffix(".state.pth")
    if rank == 0:
        check_writable(out)
    model, optimizer = build(args, device)
    ema, size, alphabet = copy.deepcopy(model), model.config["size"], model.config["alphabet"]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    network = torch.nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None) if world > 1 else model
    plain = args.model == "notebook"                # no averaging, no clipping, as the notebook trained

    # the images
    dataset, train_ids, val_ids = load_crops(args, model, rank) if args.data else (None, [], [])
    prior = province_prior([] if plain else [dataset.texts[k] for k in train_ids], alphabet).to(device)
    drawn = round(args.batch_size * args.synthetic)
    real = args.batch_size - drawn
    steps = max(math.ceil(len(train_ids) / max(1, real)), math.ceil(EPOCH / args.batch_size))
    easel = torch.device("cpu") if device.type == "mps" else device         # MPS lacks some of the camera's operations
    glyphs = data.load_glyphs(data.glyph_height(size), easel) if drawn else None
    validation = f"{evaluate.DRAWN_VAL[0]:,} drawn plates"
    if dataset:
        validation = f"{len(val_ids):,} crops" if val_ids else "none: the last weights are kept"
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{model.config['preset']} {size[0]} x {size[1]}, {parameters:,} parameters, {device} {precision}, {world} process(es)")
    say(f"training on {len(train_ids):,} crops, {drawn} of every {args.batch_size} images drawn; validation: {validation}")
    if dataset:
        say(f"decoded crops take {dataset.bytes / 1e9:.2f} GB " + ("of memory, kept after the first epoch" if dataset.cached else
            "and do not fit in half of the free memory: files are decoded in every epoch"))
    say(f"{args.epochs} epochs of {steps:,} steps of {args.batch_size} images\n")

    first, best, history = 0, None, []
    if args.resume and state_path.exists():
        state = read_state(state_path, args)
        model.load_state_dict(state["model"]), ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"]), scaler.load_state_dict(state["scaler"])
        first, best, history = state["epoch"], state["best"], state["history"]
        say(f"resumed after epoch {first}")
    elif args.resume:
        say(f"{state_path}: nothing to resume; starting from the beginning")

    begin, bad = time.time(), 0
    try:
        for epoch in range(first, args.epochs):
            losses, recent, clock, window = [], deque(maxlen=10), time.time(), 0
            # one order for all ranks, each takes every world-th image of a batch
            shuffle = np.random.default_rng(seed_of(args.seed, epoch))
            passes = math.ceil(steps * real / len(train_ids)) if train_ids else 0
            order = np.concatenate([[], *(shuffle.permutation(train_ids) for _ in range(passes))]).astype(int)
            batches = [order[k * real:(k + 1) * real][rank::world].tolist() for k in range(steps)]
            files = data.loader(dataset, batches) if real else ((None, []) for _ in range(steps))
            for k, (images, texts) in enumerate(files):
                step = epoch * steps + k
                seed = seed_of(args.seed, epoch, k, rank)
                torch.manual_seed(seed)             # dropout's
                generator = torch.Generator(easel).manual_seed(seed)
                crops = len(texts)
                images, texts = make_batch(images, texts, len(range(rank, drawn, world)), size, generator, glyphs, args.augment)
                network.train()
                with crnn.autocast(device, precision):
                    logits = network(images.to(device))
                # crops come first in the batch
                shift = prior * (torch.arange(len(texts), device=device) < crops).unsqueeze(1)          # (B, C)
                loss = batch_loss(logits + shift, texts, alphabet)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args.epochs * steps, args)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if plain else 5.0)
                # the norm is the same on all ranks, so that they skip together
                bad = 0 if torch.isfinite(norm) else bad + 1
                if scaler.is_enabled() or not bad:
                    scaler.step(optimizer)
                scaler.update()
                if not bad:
                    average(ema, model, 1.0 if plain else max(1 / 500, 9 / (10 + step)))
                    losses.append(loss.item())
                elif bad >= BAD_STEPS:
                    raise ValueError(f"{BAD_STEPS} steps in a row gave a loss that is no number; "
                                     f"the best weights are kept in {out}; lower --lr, now {args.lr:g}")
                window += len(texts)
                recent.append((texts, logits.detach()))
                if (k + 1) % LOG_EVERY == 0 or k == steps - 1 or time.time() - clock > LOG_SECONDS:
                    speed = window * world / (time.time() - clock)
                    left = (args.epochs * steps - step - 1) * args.batch_size / speed
                    preds = [text for _, some in recent for text in crnn.greedy_decode(some, alphabet)]
                    m = evaluate.metrics([text for some, _ in recent for text in some], preds)
                    say(f"epoch {epoch + 1} step {k + 1:5,}  loss {np.mean(losses[-LOG_EVERY:]):6.3f}  accuracy {m['accuracy']:.4f}  "
                        f"CER {m['cer']:.4f}  Levenshtein {m['levenshtein']:.3f}  {speed:,.0f} images/s  {left / 60:.1f} min left", flush=True)
                    if not any(preds):
                        say("  every prediction is still blank: CTC's normal first phase; "
                            "it ends within about 20,000 images (the notebook's network: 80,000)")
                    clock, window = time.time(), 0

            # the averaged weights are what is judged and kept
            m, val_loss = validate(ema, dataset, val_ids, precision, rank, world)
            row = dict(epoch=epoch + 1, images=(epoch + 1) * steps * args.batch_size, minutes=round((time.time() - begin) / 60, 2),
                       loss=float(np.mean(losses or [math.nan])), val_loss=val_loss, **m)
            history.append(row)
            if rank == 0:
                unread = f"  ({len(dataset.bad)} unreadable files left out)" if dataset and dataset.bad else ""
                say(f"=== epoch {epoch + 1:3}  loss {row['loss']:7.4f}  val loss {row['val_loss']:7.4f}  accuracy {m['accuracy']:.4f}  "
                    f"CER {m['cer']:.5f}  Levenshtein {m['levenshtein']:.4f}  {row['minutes']:.1f} min{unread}", flush=True)
                score = [m["levenshtein"], row["val_loss"]] if m["n"] else [-epoch, 0]
                if best is None or score <= best:
                    best = score
                    crnn.save_atomically(crnn.checkpoint(ema, args=vars(args), metrics=row), out)
                state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                             epoch=epoch + 1, best=best, history=history, args=vars(args))
                crnn.save_atomically(state, state_path)
                with open(out.with_suffix(".csv"), "w", encoding="utf8", newline="") as file:
                    table = csv.DictWriter(file, row)
                    table.writeheader()
                    table.writerows(history)
    except BaseException:                           # Ctrl-C, SIGTERM, a run that diverged: what there is stays usable
        if rank == 0 and best is None:
            crnn.save_atomically(crnn.checkpoint(ema, args=vars(args), metrics={}), out)
        say(f"\nstopped; {out} holds the best weights so far; --resume goes on after the last whole epoch", file=sys.stderr)
        raise
    say(f"\n{out}: the weights with the best validation Levenshtein. Next: python evaluate.py {out}")


if __name__ == "__main__":
    main()
