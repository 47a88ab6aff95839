"""`longnet prepare`: text to token shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts

from longnet.cli.check import at_least_one, check_folder, refuse_unused

if TYPE_CHECKING:
    from longnet.data.preparation import Prepared

_WORKER = 2**25  # bytes that a process of Python with a tokenizer holds, at the very least


def prepare(
    *paths: str,
    output: Annotated[Path, cyclopts.Parameter(("--output", "-o"))],
    tokenizer: str | None = None,
    train_bpe: int | None = None,
    text_field: str = "text",
    suffixes: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    exclude: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    validation: float = 0.05,
    split_by: Literal["document", "folder"] = "document",
    drop_duplicates: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    shard_tokens: int = 2**26,
    skip_damaged: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    fasta_case: Literal["keep", "upper", "lower"] = "keep",
    fasta_n: Literal["keep", "drop"] = "keep",
    workers: int | None = None,
    overwrite: Annotated[bool, cyclopts.Parameter(negative="")] = False,
) -> None:
    """Turn text into token shards for training, with a validation split.

    The same command again goes on where it was stopped or killed; once it is done, it says so and changes nothing.

    Args:
        paths: Files, folders, globs, or hf:OWNER/NAME[:CONFIG[:SPLIT]] for a data set of the Hugging Face hub.
            Plain text, source code, .jsonl, .ndjson, .json, .parquet, FASTA; also with .gz, .bz2, .xz, .zst. A
            folder's files come in path order, without hidden ones, caches and installed packages; a file that
            is named is taken whatever it is called.
        output: Folder to write.
        tokenizer: bytes (ids are bytes, nothing to choose, any text and any byte), which is the default, a
            tokenizer.json, a Hugging Face folder, or tiktoken:cl100k_base.
        train_bpe: Train a byte-level BPE vocabulary of so many tokens on the train split, instead of
            --tokenizer.
        text_field: Field of JSON lines, parquet and data sets that holds the text; a.b is field b of field a.
        suffixes: What to take from folders, instead of text and source code: suffixes like .py, or whole names
            like Makefile.
        exclude: Files and folders to leave out; shell patterns of names, like "test*", or of ends of paths,
            like "docs/*.txt".
        validation: Share of the documents for validation, by a hash of the document's name; 0 for none.
        split_by: folder keeps each folder directly below a given path on one side, so that validation shows
            none of its files.
        drop_duplicates: Leave out documents that repeat an earlier one, exactly or nearly (at least 80 % of
            their 24-byte shingles).
        shard_tokens: Tokens in a shard.
        skip_damaged: Leave out and count records and ends of files that are damaged, of a half-uploaded .jsonl
            say; else they stop.
        fasta_case: Letters of FASTA files: as they are, or all upper, or all lower case.
        fasta_n: N in FASTA files: kept, or dropped.
        workers: Processes; one per core if not given. The result does not depend on it.
        overwrite: Replace data in the output folder that was made with other options or from other files.
    """
    from longnet.data.assembly import Options
    from longnet.data.preparation import prepare as prepare_data

    if not paths:
        raise ValueError("give at least one path to prepare, like: longnet prepare src docs -o DATA")
    check_folder(output)
    if workers is not None:
        from longnet.measurement import refuse_beyond_memory

        at_least_one(workers=workers)
        refuse_beyond_memory(workers * _WORKER, f"--workers {workers:,}", "fewer; one per core is the default")
    if train_bpe is not None:
        refuse_unused("is contradicted by --train-bpe, which makes a tokenizer: give one of them", tokenizer=tokenizer)
    options = Options(
        sources=paths, tokenizer="bytes" if tokenizer is None else tokenizer, train_bpe=train_bpe,
        text_field=text_field, suffixes=suffixes,
        exclude=exclude, validation=validation, split_by=split_by, drop_duplicates=drop_duplicates,
        shard_tokens=shard_tokens, skip_damaged=skip_damaged, fasta_case=fasta_case, fasta_n=fasta_n,
    )  # fmt: skip
    try:
        done = prepare_data(options, output, workers=workers, overwrite=overwrite)
    except KeyboardInterrupt:
        print("longnet: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    _report(done, output)


def _report(done: Prepared, folder: Path) -> None:
    for option in done.unused:
        print(f"longnet: warning: {option} met no file", file=sys.stderr)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    index: dict[str, Any] = done.index
    about = index["provenance"]
    table = Table("split", "tokens", "bytes", "documents", "shards", box=box.SIMPLE_HEAD)
    for name, split in index["splits"].items():
        counts = (split["tokens"], split["bytes"], split["documents"], len(split["shards"]))
        table.add_row(name, *(f"{count:,}" for count in counts))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    text_bytes = sum(split["bytes"] for split in index["splits"].values())
    tokens = sum(split["tokens"] for split in index["splits"].values())
    console.print(f"vocabulary   {index['vocab_size']:,} tokens, {text_bytes / tokens:.2f} bytes of text each")
    if about["skipped"]:
        console.print("left out     " + ", ".join(f"{count:,} {reason}" for reason, count in about["skipped"].items()))
    if about["duplicates"]:
        console.print(f"duplicates   {about['duplicates']:,} documents dropped")
    if about["not_utf8"]:
        console.print(
            f"not UTF-8    {about['not_utf8']:,} documents, the bytes in question replaced by U+FFFD; "
            "--tokenizer bytes keeps them"
        )
    if about.get("unknown"):
        console.print(
            f"unknown      {about['unknown']:,} of {tokens:,} tokens stand for text that the tokenizer has none for, "
            "which is lost; --tokenizer bytes and --train-bpe keep all"
        )
    if done.known:
        console.print(f"{folder} had been prepared with these options from these files: nothing to do")
    else:
        console.print(f"{folder} is ready: {done.seconds:.1f} s, {text_bytes / 1e6 / done.seconds:.1f} MB/s")
