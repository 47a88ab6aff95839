"""Tokenizers, each as a Hugging Face one: bytes, a file, a folder, a tiktoken encoding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 2**24  # for which the trainer sets memory aside at once
LONGEST_WORD = 256  # characters, to which words are cut for a vocabulary trained here: its time grows with their square
# cl100k_base's, whose words suit prose and code: line ends and indentation are not cut to single characters.
_WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `spec` names; its `eos_token_id` ends documents.

    "bytes"
        ids 0 to 255 are the bytes of UTF-8, 256 is `<|endoftext|>`.
    a path
        A `tokenizer.json`, or a local Hugging Face folder.
    "tiktoken:cl100k_base"
        An encoding of tiktoken, with its ids (extra `data`).

    The end of a document is `<|endoftext|>` where the vocabulary has it, else the tokenizer's own end-of-sequence
    token; where it has neither, `<|endoftext|>` is added.

    Raises ValueError or OSError that says what to do where there is no such tokenizer.
    """
    if str(spec) == "bytes":
        return wrap(_byte_tokenizer())
    if str(spec).startswith("tiktoken:"):
        return wrap(_tiktoken(str(spec).removeprefix("tiktoken:")))
    from transformers import PreTrainedTokenizerFast

    path = Path(spec)
    if path.is_file():
        return wrap(_read(path))
    if not path.is_dir():
        raise FileNotFoundError(
            f"no tokenizer {str(spec)!r}: give bytes, tiktoken:ENCODING, a tokenizer.json, or a Hugging Face folder"
        )
    if (path / "tokenizer.json").is_file():
        _read(path / "tokenizer.json")  # transformers says less clearly what is wrong with it
    tokenizer = open_tokenizer(path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{path} holds a {type(tokenizer).__name__} without a tokenizer.json: save it as a fast one")
    return _with_end(tokenizer)


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that a Hugging Face folder holds, as it is.

    Raises:
        ValueError: it holds none.
    """
    from transformers import AutoTokenizer

    problem = "its vocabulary is empty"
    cause: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # transformers 5.0 takes a folder for that of a model whose name is in the folder's, as mpt is in "empty".
        if tokenizer.get_vocab().keys() - {token.content for token in tokenizer.added_tokens_decoder.values()}:
            return tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        problem, cause = _first_line(error).rstrip(": "), error
    raise ValueError(
        f"{folder} holds no Hugging Face tokenizer ({problem}): give a folder with tokenizer.json in it, which a "
        "tokenizer's save_pretrained writes"
    ) from cause


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the `tokenizers` library as a Hugging Face one with an end-of-sequence token."""
    from transformers import PreTrainedTokenizerFast

    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )
    return _with_end(fast)


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `size` tokens, `<|endoftext|>` among them, made from texts.

    Fewer where the texts hold no more pairs. The same texts give the same tokenizer. Words of more than LONGEST_WORD
    characters, of unbroken text as a genome is, are cut, in training and in encoding alike.
    """
    from tokenizers import AddedToken, pre_tokenizers, trainers

    check_vocabulary(size)
    tokenizer = _byte_level({}, [], _WORDS, LONGEST_WORD)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return wrap(tokenizer)


def check_vocabulary(size: int) -> None:
    """Raise ValueError for a vocabulary that is too small for every text, or larger than any memory."""
    if size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"a vocabulary needs at least {SMALLEST_VOCABULARY} tokens, the 256 bytes and {END_OF_TEXT}, got {size}"
        )
    if size > LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary has at most {LARGEST_VOCABULARY:,} tokens, got {size}")


def refuse_other_vocabulary(folder: Path, vocab_size: int, data_folder: Path, data_vocab_size: int) -> None:
    """Refuse data whose tokens are not a model's: where its folder has a tokenizer, both must give them the same ids.

    Args:
        folder: of the model.
        vocab_size: of the model.
        data_folder: of the data, which `longnet prepare` wrote.
        data_vocab_size: of the data.

    Raises:
        ValueError: other tokens, or, without a tokenizer, another number of them.
    """
    remedy = f"prepare the data with the model's tokenizer: longnet prepare … --tokenizer {folder}"
    if data_vocab_size > vocab_size:
        raise ValueError(
            f"{data_folder} has a vocabulary of {data_vocab_size:,} tokens, the model one of {vocab_size:,}: {remedy}"
        )
    if not (folder / "tokenizer.json").is_file():
        if data_vocab_size < 0.9 * vocab_size:
            raise ValueError(
                f"{data_folder} has a vocabulary of {data_vocab_size:,} tokens, the model one of {vocab_size:,}, and "
                f"{folder} holds no tokenizer that would show that they belong together: put it there, if they do"
            )
        return
    ours, theirs = load_tokenizer(folder.resolve()), load_tokenizer(data_folder / "tokenizer")
    if ours.get_vocab() != theirs.get_vocab():
        raise ValueError(f"the tokenizers of {data_folder} and {folder} differ: {remedy}")


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return 1 + the largest id; a vocabulary may have holes."""
    return 1 + max(tokenizer.get_vocab().values())


def gives_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Tell a tokenizer whose ids are the bytes of the text: `bytes`, or another one that does the same."""
    backend = tokenizer.backend_tokenizer
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if len(tokenizer.get_vocab().keys() - added) != 2**8 or backend.normalizer is not None:
        return False
    return list(backend.encode(_SAMPLE, add_special_tokens=False).ids) == list(_SAMPLE.encode())


_SAMPLE = "".join(map(chr, range(128))) + "ÀÉïöß€中😀"


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int32]:
    """Return the bytes of text that each token stands for, (V,) int32: 0 for special tokens and for unused ids.

    Summed over the tokens of a text this is its length in UTF-8 for byte-level tokenizers. Where one changes the text
    (lower case, an unknown token, a space put in front), it is the length of what the tokens spell.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = "ByteLevel" in _types(backend.get("decoder"))
    plain = {added["content"] for added in backend["added_tokens"] if not added["special"]}
    special = {added["content"] for added in backend["added_tokens"] if added["special"]}
    special |= set(tokenizer.all_special_tokens)
    sizes = np.zeros(vocab_size(tokenizer), dtype=np.int32)
    for token, index in tokenizer.get_vocab().items():
        if token in special:
            continue
        if token in plain:
            sizes[index] = len(token.encode())
        elif byte_level:
            sizes[index] = len(token)  # one character of the alphabet for each byte
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            sizes[index] = 1  # a byte that falls back
        else:
            sizes[index] = len(token.removeprefix("##").replace("▁", " ").encode())
    return sizes


def _with_end(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if END_OF_TEXT in tokenizer.get_vocab() or tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json: {_first_line(error)}") from error


def _byte_tokenizer() -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _byte_level(
    vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str, longest: int | None = None
) -> Tokenizer:
    """Return a byte-level BPE tokenizer that cuts the text by a pattern first, then to words of a length."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=bool(merges)))
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bound = [] if longest is None else [pre_tokenizers.FixedLength(longest)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, *bound, plain])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tiktoken(name: str) -> Tokenizer:
    try:
        import tiktoken
    except ImportError as error:
        raise ValueError(f"tiktoken:{name} needs the package tiktoken: pip install 'longnet-torch[data]'") from error
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"tiktoken has no encoding {name!r}; it has {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise ValueError(
            f"tiktoken cannot fetch {name} ({_first_line(error)}): the first use needs a network"
        ) from error
    ranks, letters = encoding._mergeable_ranks, bytes_to_unicode()  # type: ignore[no-untyped-call]
    texts = {rank: "".join(letters[byte] for byte in token) for token, rank in ranks.items()}
    merges = sorted(  # in order of what they make
        (rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    # As part of the vocabulary they keep their ids, which need not follow its end.
    vocabulary = {text: rank for rank, text in texts.items()} | encoding._special_tokens
    pairs = [(texts[left], texts[right]) for _, left, right in merges]
    tokenizer = _byte_level(vocabulary, pairs, _oniguruma(encoding._pat_str))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in encoding._special_tokens])
    return tokenizer


def _oniguruma(pattern: str) -> str:
    """Return a pattern of tiktoken's for `tokenizers`, where {1,3}+ would repeat and $ match at any line's end."""
    return re.sub(r"(?<!\\)\$", r"\\z", re.sub(r"(\{\d+,\d*\})\+", r"\1", pattern))


def _types(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_types(part) for part in decoder.get("decoders", [])))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
