"""A slide encoder is fine-tuned to tell labels of slides: `python examples/slide_classification.py`.

As it stands, on made-up slides and a small encoder with random weights, in seconds on one core. On yours:
`python examples/slide_classification.py FEATURES LABELS.csv --weights slide_encoder.pth --lora 8`, where FEATURES is a
folder of .h5, .pt or .safetensors files and LABELS.csv has the columns `slide` (a file's name without its suffix),
`label` (0, 1, …), and if you like `split` (`train` or `test`; otherwise every fourth slide of a label is held out).
"""

import argparse
import csv
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longnet
from longnet.data.slides import count_tiles, find_slides, read_slide
from longnet.model.versions import checkpoint_layers

Slide = tuple[Path, int]


def write_made_up_slides(folder: Path, slides: int = 48) -> None:
    """Write feature files and labels.csv: in slides of label 1 a tenth of the tiles, side by side, look different."""
    rows = ["slide,label"]
    for number in range(slides):
        label, tiles = number % 2, int(torch.randint(40, 160, ()))
        features = torch.randn(tiles, 24)
        start = int(torch.randint(tiles - tiles // 10, ()))
        features[start : start + tiles // 10, :4] += 3 * label
        places = torch.stack([torch.arange(tiles) // 13, torch.arange(tiles) % 13], 1)
        torch.save({"features": features, "coords": 256 * places}, folder / f"slide-{number}.pt")
        rows.append(f"slide-{number},{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def split(features: Path, labels: Path) -> dict[str, list[Slide]]:
    """Return the slides to train on and those held out, each with its label."""
    files = {path.stem: path for path in find_slides([str(features)])}
    parts: dict[str, list[Slide]] = {"train": [], "test": []}
    seen: dict[str, int] = defaultdict(int)
    with labels.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["slide"] not in files:
                raise ValueError(f"{labels} names {row['slide']}, of which {features} has no feature file")
            seen[row["label"]] += 1
            part = row.get("split") or ("test" if seen[row["label"]] % 4 == 0 else "train")
            parts[part].append((files[row["slide"]], int(row["label"])))
    return parts


def batches(slides: Sequence[Slide], model: Any, most_tiles: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield padded batches of up to `most_tiles` tiles, padding included; a longer slide comes alone."""
    config = model.config
    held: list[tuple[Tensor, Tensor, int]] = []

    def collated() -> tuple[dict[str, Tensor], Tensor]:
        batch = longnet.collate_slides([(tiles, coords) for tiles, coords, _ in held])
        labels = torch.tensor([label for *_, label in held])
        return {name: value.to(model.device) for name, value in batch.items()}, labels.to(model.device)

    for path, label in slides:
        slide = read_slide(path).scaled(config.tile_size)
        longest = max(len(tiles) for tiles, *_ in [*held, (slide.tile_embeds, None)])
        if held and longest * (len(held) + 1) > most_tiles:
            yield collated()
            held.clear()
        held.append((slide.tile_embeds.float(), slide.coords, label))
    if held:
        yield collated()


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Return how often a slide of label 1 scores above one of label 0, ties counted a half: the area under ROC."""
    difference = scores[labels == 1][:, None] - scores[labels == 0]
    return float(((difference > 0).float() + 0.5 * (difference == 0)).mean())


def build(weights: str | None, num_labels: int, lora: int) -> Any:
    """Return a classifier over the encoder of `weights`, or over a small one of random weights."""
    encoder: Any
    if weights is None:
        encoder = longnet.LongNetSlideModel(
            longnet.LongNetSlideConfig(
                feature_size=24, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                segment_lengths=(32, 64, 256), dilation_rates=(1, 2, 4), hidden_dropout=0.1,
            )
        )  # fmt: skip
    else:
        loaded = longnet.load_gigapath(weights)
        encoder = getattr(loaded, "slides", loaded)
    config = encoder.config
    config.num_labels = num_labels
    config.classifier_layers = (config.num_hidden_layers - 1,)  # 11 of GigaPath's 12, as its authors do
    model = longnet.LongNetForSlideClassification(config)
    model.slides.load_state_dict(encoder.state_dict())
    if lora:
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415  # `pip install peft`, for LoRA alone

        settings = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=["q_proj", "v_proj"])
        settings.modules_to_save = ["classifier"]
        return get_peft_model(model, settings)
    return model


def main(arguments: Sequence[str] = ()) -> float:
    """Fine-tune, print what the held-out slides say, and return their AUC; of more than two labels the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, nargs="?")
    parser.add_argument("labels", type=Path, nargs="?")
    parser.add_argument("--weights", help="slide_encoder.pth, or a folder")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-tiles", type=int, default=1024, help="tiles of a step, padding included")
    parser.add_argument(
        "--checkpoint-tiles", type=int, default=10_000, help="checkpoint layers where steps may have more"
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made_up:
        if options.features is None:
            write_made_up_slides(Path(made_up))
            options.features, options.labels = Path(made_up), Path(made_up) / "labels.csv"
        parts = split(options.features, options.labels)
        labels = [label for _, label in parts["train"]]
        model = build(options.weights, max(labels) + 1, options.lora)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        total = sum(parameter.numel() for parameter in model.parameters())
        print(f"trains {sum(parameter.numel() for parameter in trained):,} of {total:,} parameters")
        most = max(options.batch_tiles, *(count_tiles(path) for path, _ in parts["train"]))
        if most > options.checkpoint_tiles:
            checkpoint_layers(model)
            print(f"layers are checkpointed: a step may have {most:,} tiles")
        optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.05)
        for epoch in range(options.epochs):
            model.train()
            order = [parts["train"][index] for index in torch.randperm(len(labels)).tolist()]
            losses = []
            for batch, wanted in batches(order, model, options.batch_tiles):
                loss = model(**batch, labels=wanted).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
        model.eval()
        with torch.inference_mode():
            told = [(model(**batch).logits.cpu(), wanted.cpu()) for batch, wanted in batches(
                parts["test"], model, options.batch_tiles)]  # fmt: skip
    logits, wanted = (torch.cat(part) for part in zip(*told, strict=True))
    accuracy = float((logits.argmax(1) == wanted).float().mean())
    if logits.shape[1] > 2:
        print(f"held out, {len(wanted)} slides: accuracy {accuracy:.2f}")
        return accuracy
    auc = area_under_curve(logits[:, 1] - logits[:, 0], wanted)
    print(f"held out, {len(wanted)} slides: AUC {auc:.3f}, accuracy {accuracy:.2f}")
    return auc


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
