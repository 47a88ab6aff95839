import io

import pytest
import torch

from longnet.data.tokenizer import load_tokenizer
from longnet.evaluation.generation import Sampling, StreamedText, generate_text
from longnet.model.versions import TAKES_COLUMNS


class Pieces(io.StringIO):
    """A file that remembers what each write gave."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


@pytest.mark.parametrize("sampling", [
    Sampling(tokens=50, temperature=0), Sampling(tokens=50, temperature=1.5, top_k=9, top_p=0.8, seed=3),
])  # fmt: skip
def test_the_stream_is_what_generate_returns(model, tokenizer, sampling):
    model.float().train()
    file = Pieces()
    before = torch.get_rng_state()
    text = generate_text(model, tokenizer, "def ", sampling, file=file)
    assert torch.equal(torch.get_rng_state(), before)  # a sample must not change a training run
    assert model.training
    assert text == file.getvalue()
    assert len(file.pieces) > 3

    model.eval()
    ids = torch.tensor([tokenizer.encode("def ")])
    torch.manual_seed(sampling.seed)
    options = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": 1.5, "top_k": 9, "top_p": 0.8}
    new = model.generate(ids, max_new_tokens=50, pad_token_id=256, eos_token_id=256, **options)[0, ids.shape[1] :]
    assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_characters_of_several_tokens_are_written_whole(tokenizer):
    text = "naïve – 日本語 🧬 end"
    file = Pieces()
    stream = StreamedText(tokenizer, file)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt is not part of it
    for token in tokenizer.encode(text):
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text == file.getvalue() == text
    assert [piece for piece in file.pieces if piece] == list(text)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_read_as_they_do_at_once(tokenizer, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([
        torch.randint(0, 256, (40,), generator=generator), torch.tensor(tokenizer.encode("é")),
        torch.randint(0, 256, (seed % 4,), generator=generator),
    ])  # fmt: skip
    stream = StreamedText(tokenizer)
    stream.put(ids[:0])
    for token in ids:
        stream.put(token)
    stream.end()
    assert stream.text == tokenizer.decode(ids)


def test_generation_ends_with_the_document_and_begins_one(model, tokenizer):
    model.float()
    with torch.no_grad():
        model.lm_head.weight[256] *= 1000  # the end is likely, or most unlikely
    texts = [generate_text(model, tokenizer, prompt, Sampling(tokens=40, temperature=0)) for prompt in ("", "a", "b")]
    assert min(len(text) for text in texts) < 40
    assert all("endoftext" not in text for text in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": 0}, "tokens must be at least 1"), ({"temperature": -1}, "temperature must be 0"),
     ({"top_k": 0}, "top_k must"), ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_an_empty_prompt_needs_an_end_token(model):
    tokenizer = load_tokenizer("bytes")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token to begin with"):
        generate_text(model, tokenizer, "", Sampling())


@pytest.mark.skipif(TAKES_COLUMNS, reason="transformers cuts prompts rightly from 5.4 on")
@pytest.mark.parametrize("prompt", ["short", "a longer prompt " * 9])
def test_a_prompt_goes_forward_in_parts_of_one_size(model, tokenizer, prompt, monkeypatch):
    expected = generate_text(model, tokenizer, prompt, Sampling(tokens=12, temperature=0))
    monkeypatch.setattr("longnet.model.generation._PREFILL", 16)
    sizes = []
    model.model.register_forward_pre_hook(
        lambda _, __, keywords: sizes.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    assert generate_text(model, tokenizer, prompt, Sampling(tokens=12, temperature=0)) == expected
    assert max(sizes) <= 16
    assert sum(sizes) == len(prompt) + 11
