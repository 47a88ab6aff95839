"""DilatedCache in transformers' hands: the outputs of the ordinary cache, everywhere, and files that can be trusted."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

import longnet
from cases import DEVICES, ON_CUDA
from longnet import DilatedCache, DilationPattern
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.model import use_sparse_fixed_attention
from longnet.model.versions import CACHE, TAKES_COLUMNS, TELLS_WHAT_TO_RECORD
from model.families import BRANCHES, CAUSAL, build, dilated, positions_of, skip_broken_prefill, tokens_of

SAME = 1e-5  # logits in float32, along two paths
PLACES = [
    *((family, "cpu") for family in CAUSAL),
    *(pytest.param(family, "cuda", marks=ON_CUDA) for family in ("LongNet", "Llama")),
]


def model_of(family, dtype=torch.float32, **settings):
    return dilated(build(family, **settings), BRANCHES).to(dtype)


def in_chunks(model, ids, cache, size):
    return torch.cat([model(chunk, **{CACHE: cache}).logits for chunk in ids.split(size, 1)], 1)


@pytest.mark.parametrize("chunk", [1, 3, 50, 110])
@pytest.mark.parametrize(("family", "device"), PLACES)
@torch.no_grad()
def test_logits_are_those_without_a_cache(family, chunk, device):
    model, ids = model_of(family).to(device), tokens_of(2, 110).to(device)
    cache = DilatedCache(model.config)
    torch.testing.assert_close(in_chunks(model, ids, cache, chunk), model(ids).logits, atol=SAME, rtol=SAME)
    assert cache.get_seq_length() == 110
    heads = 2 if family in ("LongNet", "Llama", "Qwen3", "Mistral") else 4
    assert cache.nbytes == 2 * 2 * 2 * heads * 8 * 4 * BRANCHES.state_rows(tokens=110)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beams, sampled": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 7},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.skipif(TAKES_COLUMNS, reason="transformers cuts prompts rightly from 5.4 on")
@pytest.mark.parametrize("way", ["greedy", "beam search"])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_long_prompt_of_generate_goes_forward_in_parts(family, way, monkeypatch):
    monkeypatch.setattr("longnet.model.generation._PREFILL", 16)
    model, ids = model_of(family), tokens_of(2, 45)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0  # more than a part
    options = {"attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9, **WAYS[way]}
    expected = model.generate(ids, cache_implementation="dynamic", **options)
    sizes = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    assert torch.equal(model.generate(ids, **options), expected)
    assert sizes[:3] == [16, 16, 13]
    handle.remove()
    if way == "greedy":  # embeddings, which are no tokens, go forward in one piece
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, 45:])


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(("family", "device"), PLACES)
def test_generate_is_that_with_the_ordinary_cache(family, way, device):
    """70 tokens: past every boundary of segments of 4, 8 and 32."""
    if way == "chunked prefill":
        skip_broken_prefill("dynamic")
    model, ids = model_of(family).to(device), tokens_of(1 if way == "prompt lookup" else 2, 13).to(device)
    mask = torch.ones_like(ids)
    if way != "prompt lookup":
        mask[0, :5] = 0
    results = []
    for cache in ({}, {"cache_implementation": "dynamic"}):
        torch.manual_seed(7)
        results.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=70,
                min_new_tokens=70,
                return_dict_in_generate=True,
                output_logits=way == "greedy",
                **WAYS[way],
                **cache,
            )
        )
    ours, ordinary = results
    assert isinstance(ours[CACHE], DilatedCache)
    assert isinstance(ordinary[CACHE], DynamicCache)
    assert torch.equal(ours.sequences, ordinary.sequences)
    if way == "greedy":
        for one, other in zip(ours.logits, ordinary.logits, strict=True):
            torch.testing.assert_close(one, other, atol=SAME, rtol=SAME)
    rows = BRANCHES.state_rows(tokens=83)
    assert ours[CACHE].layers[0].keys.shape[2] == rows
    assert ordinary[CACHE].layers[0].keys.shape[2] > rows


def test_an_assistant_may_be_wrong_across_segments():
    model, assistant = model_of("Llama"), model_of("Llama", num_hidden_layers=1)
    ids = tokens_of(1, 13)
    model.generation_config.eos_token_id = None  # transformers 5.0 takes no min_new_tokens beside an assistant
    settings = {"max_new_tokens": 60, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assisted = model.generate(ids, assistant_model=assistant, num_assistant_tokens=5, **settings)
    assert torch.equal(assisted, model.generate(ids, **settings, cache_implementation="dynamic"))


@pytest.mark.parametrize("family", CAUSAL)
def test_generate_goes_on_from_a_given_cache(family):
    model, ids = model_of(family), tokens_of(1, 40)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    cache = DilatedCache(model.config)
    with torch.no_grad():
        model(ids[:, :33], **{CACHE: cache})
    again = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **{CACHE: cache})
    assert torch.equal(again, expected)
    with pytest.raises(ValueError, match="a cache that starts at 5"):
        model.generate(ids, **{CACHE: DilatedCache(model.config, start=5)}, **settings)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_rows_of_unequal_length(device):
    model, ids = model_of("LongNet").to(device), tokens_of(3, 60).to(device)
    mask = torch.ones_like(ids)
    mask[0, :25], mask[1, :1] = 0, 0
    expected = model(ids, attention_mask=mask).logits
    for size in (1, 9, 60):
        cache = DilatedCache(model.config)
        for start in range(0, 60, size):
            stop = min(start + size, 60)
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: cache}).logits
            real = mask[:, start:stop].bool()
            torch.testing.assert_close(out[real], expected[:, start:stop][real], atol=SAME, rtol=SAME)
    with pytest.raises(ValueError, match="must cover the 60 cached and the 1 new"):
        model(ids[:, :1], attention_mask=mask[:, :1], **{CACHE: cache})
    llama = model_of("Llama").to(device)
    cache = DilatedCache(llama.config)
    llama(ids, attention_mask=mask, position_ids=positions_of(mask), **{CACHE: cache})
    with pytest.raises(ValueError, match="must cover the 60 cached and the 1 new"):
        llama(ids[:, :1], attention_mask=mask[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("position_embedding", ["xpos", "rope"])
@pytest.mark.parametrize("far", [2**31, 2**32, 10**9])
@torch.no_grad()
def test_positions_far_out(far, position_embedding):
    """Only differences of positions count, so a text that starts at a multiple of all segments starts at 0."""
    pattern = {"segment_lengths": (16, 32, 48), "dilation_rates": (1, 2, 5)}
    model, ids = build("LongNet", **pattern, position_embedding=position_embedding), tokens_of(2, 110)
    model.set_attn_implementation("dilated")
    expected = model(ids).logits
    for size in (1, 37):
        cache = DilatedCache(model.config, start=far // 96 * 96)
        got = in_chunks(model, ids, cache, size)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == far // 96 * 96 + 110
    # Within a segment it is the text after others that were never seen: the oracle of the state says the same.
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    cache = DilatedCache(model.config, start=far // 96 * 96)
    padded = model(ids, attention_mask=mask, **{CACHE: cache}).logits
    torch.testing.assert_close(padded[:1, 20:], model(ids[:1, 20:]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_rows_are_chosen_repeated_and_reset(device):
    model, ids = model_of("Qwen3").to(device), tokens_of(3, 60).to(device)
    expected = model(ids).logits
    cache = DilatedCache(model.config)
    model(ids[:, :41], **{CACHE: cache})
    whole = copy.deepcopy(cache)

    def go_on(cache, rows):
        got = model(ids[rows, 41:], **{CACHE: cache}).logits
        torch.testing.assert_close(got, expected[rows, 41:], atol=SAME, rtol=SAME)

    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 4], device=device))
    cache.reorder_cache(torch.tensor([2, 0, 1], device=device))
    go_on(cache, [2, 0, 0])
    masked = copy.deepcopy(whole)
    masked.batch_select_indices(torch.tensor([True, False, True]))
    go_on(masked, [0, 2])
    whole.reset()
    assert whole.get_seq_length() == 0
    torch.testing.assert_close(model(ids, **{CACHE: whole}).logits, expected, atol=SAME, rtol=SAME)


@torch.no_grad()
def test_crop():
    model, ids = model_of("Llama"), tokens_of(1, 60)
    expected, cache = model(ids).logits, DilatedCache(model.config)
    model(ids[:, :42], **{CACHE: cache})
    model(ids[:, :2], **{CACHE: cache})  # 42, 43: segments of 4 begin at 40 and 44
    cache.crop(-2)
    torch.testing.assert_close(model(ids[:, 42:45], **{CACHE: cache}).logits, expected[:, 42:45], atol=SAME, rtol=0)
    with pytest.raises(ValueError, match=r"cannot crop 2 tokens at position 45: a segment of 4 began"):
        cache.crop(-2)
    assert cache.get_seq_length() == 45
    cache.activate_past_recording()
    model(ids[:, :9], **{CACHE: cache})
    cache.crop(-8)
    cache.crop(0)
    if TELLS_WHAT_TO_RECORD:  # before, a positive number is one to keep
        with pytest.raises(ValueError, match="minus the number"):
            cache.crop(8)
    cache.activate_past_recording()
    cache.reset()
    model(ids[:, :45], **{CACHE: cache})
    model(ids[:, :9], **{CACHE: cache})
    cache.crop(-9)
    torch.testing.assert_close(in_chunks(model, ids[:, 45:], cache, 4), expected[:, 45:], atol=SAME, rtol=0)


@pytest.fixture
def saved(tmp_path):
    model, ids = model_of("LongNet", torch.bfloat16), tokens_of(2, 60)
    cache = DilatedCache(model.config)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        model(ids[:, :41], attention_mask=mask[:, :41], **{CACHE: cache})
        cache.save(tmp_path / "cache.safetensors")
        expected = model(ids[:, 41:], attention_mask=mask, **{CACHE: cache}).logits
    return model, ids, mask, expected, tmp_path / "cache.safetensors"


@torch.no_grad()
def test_a_file_keeps_the_cache(saved):
    model, ids, mask, expected, path = saved
    cache = DilatedCache.load(path, model.config)
    assert torch.equal(model(ids[:, 41:], attention_mask=mask, **{CACHE: cache}).logits, expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="nothing to save"):
        DilatedCache(model.config).save(path)
    with pytest.raises(OSError, match="cannot write"):
        cache.save(path.parent / "none" / "cache")
    with pytest.raises(FileNotFoundError, match="no cache file"):
        DilatedCache.load(path.with_name("other"), model.config)
    other = model_of("LongNet", num_hidden_layers=3)
    with pytest.raises(ValueError, match="holds 2 layers"):
        DilatedCache.load(path, other.config)
    longnet.use_dilated_attention(model, DilationPattern((4,), (1,)))
    with pytest.raises(ValueError, match=r"of the pattern 4:1,8:2,32:3"):
        DilatedCache.load(path, model.config)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.6, 0.999])
def test_a_damaged_file_is_refused(saved, place):
    model, *_, path = saved
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"damaged|no cache file"):
        DilatedCache.load(path, model.config)


@pytest.mark.parametrize("size", [0, 5, 2000])
def test_half_a_file_is_refused(saved, size):
    model, *_, path = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged"):
        DilatedCache.load(path, model.config)


@torch.no_grad()
def test_room_is_made_at_once_where_everything_is_known():
    model = model_of("LongNet")
    cache = DilatedCache(model.config, 2, torch.float32, "cpu")
    rows = BRANCHES.state_rows(tokens=10**9)
    assert rows == 4 + 4 + 11
    assert cache.nbytes == 2 * 2 * 2 * 2 * 8 * 4 * rows
    room = cache.layers[0].keys.data_ptr()
    in_chunks(model, tokens_of(2, 70), cache, 11)
    assert cache.layers[0].keys.data_ptr() == room  # written in place
    assert cache.to("cpu") is cache
    assert DilatedCache(model.config).nbytes == 0


@pytest.mark.parametrize("family", ["Llama", "LongNet"])
@torch.no_grad()
def test_what_cannot_be_served_is_refused(family):
    model, ids = model_of(family), tokens_of(1, 20)
    cache = DilatedCache(model.config)
    dense = build(family)
    dense(ids, **{CACHE: cache}, position_ids=torch.arange(20)[None])
    with pytest.raises(ValueError, match="no attention read"):
        dense(ids, **{CACHE: cache}, position_ids=torch.arange(20)[None])
    cache.reset()
    sparse = build(family)
    sparse.config.segment_lengths, sparse.config.dilation_rates = [4], [1]
    use_sparse_fixed_attention(sparse, SparseFixedPattern(8, 2))
    with pytest.raises(ValueError, match="cannot serve sparse_fixed"):
        sparse(ids, **{CACHE: DilatedCache(sparse.config)})
    other = copy.deepcopy(model)
    longnet.use_dilated_attention(other, DilationPattern((8,), (1,)))
    with pytest.raises(ValueError, match=r"for the pattern 4:1,8:2,32:3, the model's is 8:1"):
        other(ids, **{CACHE: DilatedCache(model.config)})
    with pytest.raises(ValueError, match="start must be at least 0"):
        DilatedCache(model.config, start=-1)
    plain = build("Llama").config
    with pytest.raises(ValueError, match="holds none"):
        DilatedCache(plain)


def test_a_hybrid_model_is_refused_and_generates_with_its_own_cache():
    config = build("Llama").config
    config.layer_types = ["full_attention", "linear_attention"]
    config.segment_lengths, config.dilation_rates = [4], [1]
    with pytest.raises(ValueError, match=r"layers of another kind than attention, \['linear_attention'\]"):
        DilatedCache(config)


def test_gradients_are_refused_loudly():
    model, ids = model_of("LongNet"), tokens_of(1, 20)
    out = model(ids, **{CACHE: DilatedCache(model.config)}).logits
    with pytest.raises(RuntimeError, match="keeps no gradients"):
        out.sum().backward()


def test_what_a_file_says_is_plain_json(saved):
    *_, path = saved
    size = int.from_bytes(path.read_bytes()[:8], "little")
    about = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["cache"])
    assert about["next"] == [[41, 34]] * 2
    assert about["columns"] == [41, 41]
    assert about["pattern"] == str(BRANCHES)


def test_a_window_that_hides_nothing():
    """Mistral's mask function is asked at points of the whole text, and generate() gives it no padding mask."""
    model, ids = dilated(build("Mistral", sliding_window=64), BRANCHES), tokens_of(1, 20)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    ours = model.generate(ids, **settings, return_dict_in_generate=True)
    assert isinstance(ours[CACHE], DilatedCache)
    plain = dilated(build("Mistral"), BRANCHES)
    assert torch.equal(ours.sequences, plain.generate(ids, **settings, cache_implementation="dynamic"))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    ids, cache = tokens_of(2, 40), DilatedCache(model.config)
    for start, stop in ((0, 5), (5, 20), (20, 21), (21, 40)):
        where = positions_of(mask)[:, start:stop]
        got = model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=where, **{CACHE: cache}).logits
    expected = plain(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, 21:]
    torch.testing.assert_close(got, expected, atol=SAME, rtol=SAME)


_PREFILL = """
import torch
from longnet import DilatedCache, DilationPattern, LongNetConfig, LongNetModel
from longnet.measurement import peak_bytes

CPU = torch.device("cpu")
pattern = DilationPattern.geometric(64, 2**30)
model = LongNetModel(LongNetConfig.preset(
    "tiny", hidden_size=128, num_hidden_layers=2, num_attention_heads=4, position_embedding="rope",
    segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
)).eval()

@torch.inference_mode()
def growth(chunk, tokens):
    cache, ids = DilatedCache(model.config), torch.zeros(1, chunk, dtype=torch.int64)
    before = peak_bytes(CPU, reset=True)
    for _ in range(tokens // chunk):
        model(ids, cache=cache)
    assert cache.get_seq_length() == tokens
    return peak_bytes(CPU) - before

growth(1024, 4096)  # libraries load their parts
for case in ((2048, 2**13), (2048, 2**17), (16384, 2**17)):
    print(min(growth(*case) for _ in range(2)))  # the first holds what is loaded or grows once, too
"""


def test_prefill_holds_a_chunk_and_the_state_whatever_the_length():
    # Freed memory goes back to the system at once, so that the peak is what was held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", _PREFILL]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    short, long, wide = map(int, done.stdout.split()[-3:])
    dense = 2 * 2 * 2**17 * 128 * 4  # keys and values of all tokens, which another cache would hold
    assert long < 1.1 * short
    assert long < dense / 10
    assert wide > 4 * long  # so it is the chunk that is measured
