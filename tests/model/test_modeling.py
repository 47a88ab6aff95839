"""The model against the papers' equations written out, torch's sdpa, itself in other forms, and files."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, LongNetModel, dilated_attention
from longnet.model.versions import CACHE, checkpoint_layers
from longnet.model.visibility import visible_tokens
from longnet.positions import RotaryPositions

SAME = 1e-5  # logits and gradients in float32, along two paths
FLOAT64 = 1e-10
AUTOCAST = 0.05  # logits of unit variance in bfloat16
PATTERN = {"segment_lengths": (16, 32, 48), "dilation_rates": (1, 2, 5)}  # all end together every 96 tokens
ONE_BRANCH = {"segment_lengths": (10**4,), "dilation_rates": (1,)}


def config(**fields):
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, **PATTERN}
    return LongNetConfig.preset("tiny", **{**small, **fields})


def model(dtype=torch.float64, **fields):
    torch.manual_seed(1)
    made = LongNetForCausalLM(config(**fields)).to(dtype).eval()
    with torch.no_grad():  # biases and LayerNorms off their initial 0 and 1, so that each has to be in its place
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(2))


def written_out(made, ids):
    """The logits of ids (B, T) from the papers: MAGNETO fig. 2, xPos alg. 1, scales uncentred, LongNet eq. 3-15."""
    c, w = made.config, {name: value.double() for name, value in made.state_dict().items()}

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + c.layer_norm_eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def turned(x, sign):
        half = c.head_dim // 2
        i, m = torch.arange(half).double(), torch.arange(x.shape[2]).double()[:, None]
        angle = m * c.rope_theta ** (-i / half)
        zeta = (i / half + 0.4) / 1.4
        pairs = torch.complex(x[..., :half], x[..., half:])
        pairs = pairs * torch.polar(zeta ** (sign * m / c.xpos_scale_base), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        h = norm(x, f"{p}.input_layernorm")
        q, k, v = (
            linear(h, f"{p}.self_attn.{n}").view(*ids.shape, -1, c.head_dim).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        out = dilated_attention(turned(q, 1), turned(k, -1), v, c.pattern, is_causal=True, backend="reference")
        out = norm(out.transpose(1, 2).flatten(2), f"{p}.self_attn.sub_layernorm")
        x = x + linear(out, f"{p}.self_attn.o_proj")
        h = linear(norm(x, f"{p}.post_attention_layernorm"), f"{p}.mlp.fc1")
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = x + linear(norm(h, f"{p}.mlp.sub_layernorm"), f"{p}.mlp.fc2")
    return norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


def test_the_model_is_what_the_papers_say():
    made, ids = model(), tokens(2, 230)
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, written_out(made, ids), atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_initialisation_is_magnetos(layers):
    torch.manual_seed(0)
    made = LongNetModel(LongNetConfig.preset("5m", num_hidden_layers=layers))
    gain = math.sqrt(math.log(2 * layers))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layernorm" in name or name == "norm.weight":
            assert (parameter == 1).all(), name
        elif name.startswith("layers"):
            xavier = math.sqrt(2 / sum(parameter.shape))
            scaled = any(part in name for part in ("v_proj", "o_proj", "fc1", "fc2"))
            assert parameter.std().item() == pytest.approx(xavier * (gain if scaled else 1), rel=0.02), name
        else:
            assert parameter.std().item() == pytest.approx(256**-0.5, rel=0.02), name


def test_without_sub_layernorm_it_is_a_plain_pre_layernorm_decoder():
    names = [name for name, _ in model(sub_layernorm=False).named_parameters()]
    assert not any("sub_layernorm" in name for name in names)
    plain = LongNetModel(LongNetConfig.preset("5m", sub_layernorm=False))
    weight = plain.layers[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.02)


def left_padded(ids, mask):
    counts = mask.sum(1)
    rows = [torch.cat([row[count:], row[:count]]) for row, count in zip(ids, counts, strict=True)]
    return torch.stack(rows), mask.flip(1)


def inputs(mode):
    ids, mask = tokens(3, 100), torch.ones(3, 100, dtype=torch.long)
    if mode == "plain":
        return {"input_ids": ids}
    if mode == "packed":
        return {"input_ids": ids[:1], "position_ids": torch.cat([torch.arange(n) for n in (41, 1, 58)])[None]}
    for row, real in enumerate((100, 37, 1)):
        mask[row, real:] = 0
    if mode == "left":
        ids, mask = left_padded(ids, mask)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("mode", ["plain", "right", "left", "packed"])
@pytest.mark.parametrize("position_embedding", ["xpos", "rope", "none"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_one_branch_over_everything_is_dense_attention(mode, position_embedding, other):
    given, results = inputs(mode), []
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    weights = torch.randn(*given["input_ids"].shape, 61) * real[..., None]
    for implementation in ("dilated", other):
        made = model(torch.float32, **ONE_BRANCH, position_embedding=position_embedding, max_position_embeddings=128)
        made.set_attn_implementation(implementation)
        logits = made(**given).logits
        (logits * weights).mean().backward()
        results.append((logits * real[..., None], *(p.grad for p in made.parameters())))
    for got, dense in zip(*results, strict=True):
        torch.testing.assert_close(got, dense, atol=SAME, rtol=SAME)


@pytest.mark.parametrize("implementation", ["dilated", "sdpa"])
@pytest.mark.parametrize("mode", ["right", "left", "packed"])
def test_padding_and_packing_change_nothing(mode, implementation):
    made, given = model(attn_implementation=implementation), inputs(mode)
    logits = made(**given).logits
    if mode == "packed":
        starts = (given["position_ids"][0] == 0).nonzero().flatten().tolist()
        documents = zip(starts, [*starts[1:], 100], strict=True)
        alone = [made(given["input_ids"][:, a:b]).logits[0] for a, b in documents]
        torch.testing.assert_close(logits[0], torch.cat(alone), atol=FLOAT64, rtol=FLOAT64)
        return
    for row, mask in enumerate(given["attention_mask"].bool()):
        alone = made(given["input_ids"][row : row + 1, mask]).logits[0]
        torch.testing.assert_close(logits[row, mask], alone, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("position_embedding", ["xpos", "rope", "none"])
@pytest.mark.parametrize("implementation", ["dilated", "sdpa", "eager"])
def test_cached_logits_are_the_uncached(position_embedding, implementation):
    """In chunks, then token by token, over many segments: torchscale is wrong at odd steps and crashes at 17."""
    made = model(position_embedding=position_embedding, attn_implementation=implementation)
    ids, cache, parts = tokens(2, 220), DynamicCache(config=made.config), []
    for start, stop in [(0, 7), (7, 40), (40, 180), *((t, t + 1) for t in range(180, 220))]:
        parts.append(made(ids[:, start:stop], **{CACHE: cache}, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), made(ids).logits, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_generates_the_same(implementation):
    made, ids = model(attn_implementation=implementation), tokens(2, 50)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    static = made.generate(ids, **settings, cache_implementation="static")
    assert torch.equal(static, made.generate(ids, **settings))


@pytest.mark.parametrize("implementation", ["dilated", "sdpa"])
def test_generate_is_the_greedy_argmax(implementation):
    made, given = model(attn_implementation=implementation), inputs("left")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    together = made.generate(**given, **settings)[:, 100:]
    assert torch.equal(made.generate(**given, **settings, use_cache=False)[:, 100:], together)
    for row, mask in enumerate(given["attention_mask"].bool()):
        ids = given["input_ids"][row : row + 1, mask]
        for token in together[row]:
            assert made(ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, token.view(1, 1)], 1)


@torch.no_grad()
def test_a_cache_is_taken_under_both_of_its_names():
    made, ids = model(), tokens(1, 9)
    expected = made(ids).logits[:, 6:]
    for name in ("cache", "past_key_values"):
        held = DynamicCache(config=made.config)
        made(ids[:, :6], **{name: held})
        torch.testing.assert_close(made(ids[:, 6:], **{name: held}).logits, expected)
        assert held.get_seq_length() == 9
    with pytest.raises(ValueError, match="two names of one argument"):
        made(ids, cache=held, past_key_values=held)


def test_a_cache_is_not_made_where_it_cannot_be_continued():
    made, packed = model(), inputs("packed")
    assert made(tokens(1, 5))[CACHE].get_seq_length() == 5
    assert made(**packed).get(CACHE) is None
    assert made.train()(tokens(1, 5)).get(CACHE) is None
    with pytest.raises(ValueError, match="position_ids restart"):
        made.eval()(**packed, cache=DynamicCache(config=made.config))
    with pytest.raises(ValueError, match="position_ids restart"):
        made(**packed, use_cache=True)
    cached = made(tokens(1, 5))[CACHE]
    with pytest.raises(ValueError, match="must cover the 5 cached and the 1 new tokens"):
        made(tokens(1, 1), attention_mask=torch.ones(1, 1), **{CACHE: cached})
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        made.model()


@pytest.mark.parametrize("implementation", ["dilated", "sdpa"])
def test_positions_may_start_anywhere(implementation):
    """Only differences count, also at a billion, where float32 angles would be noise."""
    ids, far = tokens(1, 100), 10**9 // 96 * 96
    made = model(torch.float32, position_embedding="rope", attn_implementation=implementation)
    torch.testing.assert_close(
        made(ids, position_ids=torch.arange(far, far + 100)[None]).logits, made(ids).logits, atol=1e-4, rtol=1e-4
    )


def test_xpos_at_a_billion_and_where_it_must_refuse():
    ids, far = tokens(1, 100), 10**9 // 96 * 96
    made = model(torch.float32)
    at_far = made(ids, position_ids=torch.arange(far, far + 100)[None]).logits
    torch.testing.assert_close(at_far, made(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="count from multiples of 96"):
        made(ids, position_ids=torch.arange(far + 1, far + 101)[None])
    made.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="overflows"):
        made(ids, position_ids=torch.arange(far, far + 100)[None])


@pytest.mark.parametrize(
    ("position_embedding", "implementation", "mode"),
    [
        (embedding, implementation, mode)
        for embedding, implementation in (("xpos", "dilated"), ("rope", "dilated"), ("rope", "sdpa"))
        for mode in ("plain", "right", "left", "packed", "cu_seq_lens")
        if mode != "cu_seq_lens" or implementation == "dilated"  # which sdpa does not read
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_billion_is_as_good_as_zero(dtype, position_embedding, implementation, mode):
    """Logits of tokens at 10⁹ err, against float64 at 0, no more than those at 0 in the same dtype."""
    given = inputs("packed" if mode == "cu_seq_lens" else mode)
    near, far = torch.arange(100)[None], 10**9 // 96 * 96
    if "position_ids" in given:
        near = given.pop("position_ids")
        far = torch.where(torch.arange(100) < 42, far, far - 96 * 7)  # two documents here, and another one further back
    elif "attention_mask" in given:
        near = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if mode == "cu_seq_lens":
        edges = torch.tensor([0, 41, 42, 100], dtype=torch.int32)
        given |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    made = model(dtype, position_embedding=position_embedding, attn_implementation=implementation)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    at_near, at_far = (made(**given, position_ids=at).logits[real].double() for at in (near, near + far))
    exact = made.double()(**given, position_ids=near).logits[real]
    assert (at_far - exact).norm() <= 1.2 * (at_near - exact).norm()
    assert (at_far - exact).norm() <= (1e-5 if dtype == torch.float32 else AUTOCAST) * exact.norm()


def test_long_sequences_stay_finite_where_xpos_of_others_overflows():
    made = model(torch.bfloat16, segment_lengths=(64, 512), dilation_rates=(1, 8), num_hidden_layers=1)
    with torch.no_grad():
        assert made.model(tokens(1, 80_000)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("tie", [True, False])
def test_files_keep_the_model(tmp_path, tie):
    made, ids = model(torch.float32, tie_word_embeddings=tie), tokens(2, 50)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tie
    made.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for kind in (LongNetForCausalLM, AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is LongNetForCausalLM
        assert again.config._attn_implementation == "dilated"
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
        assert torch.equal(again(ids).logits, made(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], made.model(ids)[0])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert dense.config._attn_implementation == "sdpa"
    assert not torch.allclose(dense(ids).logits, made(ids).logits)


def test_loading_in_bfloat16_keeps_the_positions(tmp_path):
    made, ids = model(torch.float32), tokens(2, 200)
    made.save_pretrained(tmp_path)
    again = LongNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.model.rotary.turn_steps, made.model.rotary.turn_steps)
    assert again(ids).logits.dtype == torch.bfloat16
    with torch.no_grad():
        error = (again(ids).logits.float() - made(ids).logits).std() / made(ids).logits.std()
    assert error < AUTOCAST


def test_half_a_checkpoint_initialises_the_rest(tmp_path):
    made = model(torch.float32, tie_word_embeddings=False)
    made.model.save_pretrained(tmp_path)  # no head
    again = LongNetForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.embed_tokens.weight, made.model.embed_tokens.weight)
    assert torch.equal(again.model.layers[1].mlp.fc1.weight, made.model.layers[1].mlp.fc1.weight)
    assert 0.1 < again.lm_head.weight.std() < 0.3  # 32 ** -0.5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    made, ids = model().train(), tokens(2, 100)
    made(ids, labels=ids).loss.backward()
    before = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    checkpoint_layers(made, use_reentrant=use_reentrant)
    if use_reentrant:
        made.enable_input_require_grads()
    made(ids, labels=ids).loss.backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], atol=FLOAT64, rtol=FLOAT64)
    with pytest.raises(ValueError, match="fill the cache twice"):
        made(ids, use_cache=True)


def test_autocast_is_near_float32():
    made, ids = model(torch.float32).train(), tokens(2, 200)
    exact = made(ids, labels=ids)
    exact.loss.backward()
    grad = made.model.layers[0].self_attn.q_proj.weight.grad.clone()
    made.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = made(ids, labels=ids)
    rounded.loss.backward()
    assert rounded.loss.dtype == torch.float32
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    error = (made.model.layers[0].self_attn.q_proj.weight.grad - grad).norm() / grad.norm()
    assert error < AUTOCAST


def test_outputs_of_layers_are_there_for_the_asking():
    made, ids = model(), tokens(2, 40)
    states = made(ids, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 40, 32)] * 3
    assert torch.equal(states[0], made.model.embed_tokens(ids))
    assert torch.equal(states[-1], made.model(ids).last_hidden_state)
    made.set_attn_implementation("eager")
    attentions = made(ids, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 40, 40)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
    assert isinstance(made(ids, return_dict=False), tuple)


def test_inputs_embeds_stand_for_input_ids():
    made, ids = model(), tokens(2, 40)
    assert torch.equal(made(inputs_embeds=made.model.embed_tokens(ids)).logits, made(ids).logits)


def test_dropout_drops_only_in_training():
    made, ids = model(hidden_dropout=0.5), tokens(1, 40)
    assert torch.equal(made(ids).logits, made(ids).logits)
    assert not torch.equal(made.train()(ids).logits, made(ids).logits)


def test_it_learns():
    torch.manual_seed(0)
    made, ids = LongNetForCausalLM(config()).train(), tokens(4, 120)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(made(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0].item() == pytest.approx(math.log(61) + 0.5, abs=0.4)  # a head of unit-variance logits
    assert losses[-1].item() < 0.6 * losses[0].item()


def test_the_pattern_is_read_from_the_configuration():
    ids, made = tokens(1, 90), model()
    before = made(ids).logits
    made.config.segment_lengths, made.config.dilation_rates = (8,), (1,)
    assert made.config.pattern == DilationPattern((8,), (1,))
    assert not torch.allclose(made(ids).logits, before)


def test_no_float_buffer_holds_positions():
    assert all(not buffer.is_floating_point() for buffer in model().buffers())
    assert any(isinstance(module, RotaryPositions) for module in model().modules())
    assert not any(isinstance(module, RotaryPositions) for module in model(position_embedding="none").modules())


def test_the_head_is_the_transposed_embedding_when_tied():
    made, ids = model(), tokens(1, 10)
    hidden = made.model(ids).last_hidden_state
    assert torch.equal(made(ids).logits, F.linear(hidden, made.model.embed_tokens.weight))
    assert made(ids, logits_to_keep=3).logits.shape == (1, 3, 61)


def test_documents_that_start_late_are_refused_with_xpos():
    """The scales of xPos count from multiples of 96 here, segments from each document's start."""
    made, ids = model(), tokens(1, 140)
    late = torch.cat([torch.arange(20), torch.arange(5, 125)])[None]
    with pytest.raises(ValueError, match=r"that start at \[5\]"):
        made(ids, position_ids=late)
    with pytest.raises(ValueError, match=r"that start at \[5\]"):
        made(ids[:, :8], position_ids=torch.arange(5, 13)[None], **{CACHE: DynamicCache(config=made.config)})
    repeated = torch.cat([torch.arange(3), torch.arange(2, 139)])[None]
    with pytest.raises(ValueError, match=r"that start at \[2\]"):
        made(ids, position_ids=repeated)
    edges = torch.tensor([0, 11, 140], dtype=torch.int32)
    with pytest.raises(ValueError, match="position_ids that restart"):
        made(ids, cu_seq_lens_q=edges, cu_seq_lens_k=edges)
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="count from multiples of 96"):
        compiled(ids, position_ids=late)
    fits = torch.cat([torch.arange(20), torch.arange(96, 216)])[None]
    torch.testing.assert_close(compiled(ids, position_ids=fits).logits, made(ids, position_ids=fits).logits)
    moved = made(ids[:, :8], position_ids=torch.arange(5, 13)[None]).logits  # within one block only differences count
    torch.testing.assert_close(moved, made(ids[:, :8]).logits, atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("is_made_ahead", [False, True])
def test_positions_of_padding_mean_nothing(is_made_ahead):
    """Many fill them with 1, transformers' generate() before 5.4 too; no document starts there."""
    made, ids = model(), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, 36:] = 0
    positions = mask.cumsum(1) - 1
    expected = made(ids, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
    given = mask
    if is_made_ahead:  # as by generate() for a static cache
        given = visible_tokens(batch_size=2, q_length=40, kv_length=40, attention_mask=mask)
    filled = positions.masked_fill(mask == 0, 1)
    got = made(ids, attention_mask=given, position_ids=filled, **{CACHE: DynamicCache(config=made.config)}).logits
    assert torch.equal(got[mask == 1], expected[mask == 1])
    for fill in (0, 1, 5):  # what looks as if the text went on from the padding
        late = (positions + 1).masked_fill(mask == 0, fill)[:1]
        with pytest.raises(ValueError, match=r"that start at \[1\]"):
            made(ids[:1], attention_mask=mask[:1], position_ids=late, **{CACHE: DynamicCache(config=made.config)})


def test_a_mask_that_is_too_short_ends_in_padding():
    made, ids = model(), tokens(1, 40)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, 30:] = 0
    given = {"position_ids": torch.arange(40)[None], "use_cache": False}
    expected = made(ids, attention_mask=mask, **given).logits
    torch.testing.assert_close(made(ids, attention_mask=mask[:, :30], **given).logits, expected, atol=FLOAT64, rtol=0)


def test_a_cache_that_is_given_comes_back():
    made, ids = model(), tokens(1, 12)
    cache = DynamicCache(config=made.config)
    out = made(ids, position_ids=torch.arange(12)[None], **{CACHE: cache})
    assert out[CACHE] is cache
    assert cache.get_seq_length() == 12
