"""The attention implementations: found by name, kept in the config, and refusing what they cannot honour."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_chunked_causal_mask

import longnet
from longnet import DilationPattern
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.model import interface, use_sparse_fixed_attention
from longnet.model.interface import Visible, dilated_attention_forward
from model.families import (
    BRANCHES,
    CAUSAL,
    FAMILIES,
    ONE_BRANCH,
    VERSION,
    build,
    dilated,
    mask_of,
    positions_of,
    tokens_of,
)

TOKENS = 37


def run(model, **inputs):
    return model(input_ids=tokens_of(2, TOKENS), **inputs).logits


def test_importing_longnet_imports_no_transformers():
    code = "import longnet, sys; assert 'transformers' not in sys.modules; assert longnet.use_dilated_attention"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_pretrained_by_name(tmp_path):
    model = build("Llama")
    longnet.use_dilated_attention(model, BRANCHES)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["segment_lengths"] == [4, 8, 32]
    assert saved["dilation_rates"] == [1, 2, 3]
    assert saved["head_offsets"] == "mod"
    code = f"""
import torch, longnet.model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="dilated")
torch.save(model(torch.arange(3, 40)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(torch.arange(3, 40)[None]).logits)


def test_pattern_written_into_a_config_by_hand(tmp_path):
    build("GPT-NeoX").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = {"segment_lengths": [4, 8, 32], "dilation_rates": [1, 2, 3], "head_offsets": "block"}
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated")
    pattern = DilationPattern((4, 8, 32), (1, 2, 3), "block")
    torch.testing.assert_close(run(model), run(dilated(build("GPT-NeoX"), pattern)))
    assert not torch.allclose(run(model), run(dilated(build("GPT-NeoX"), BRANCHES)))


def test_no_pattern_in_the_config():
    with pytest.raises(ValueError, match=r"LlamaConfig holds none: call longnet.use_dilated_attention"):
        run(build("Llama", attn_implementation="dilated"))
    with pytest.raises(ValueError, match=r"LlamaConfig holds none: call longnet.model.use_sparse_fixed_attention"):
        run(build("Llama", attn_implementation="sparse_fixed"))


@pytest.mark.parametrize("family", ["LongNet", "Llama"])
def test_a_pattern_without_a_rate_of_one_compiles_whole(family):
    with pytest.warns(UserWarning, match="no branch of dilation rate 1"):
        pattern = DilationPattern((8, 32), (2, 4))
    settings = {"position_embedding": "rope"} if family == "LongNet" else {}
    model = dilated(build(family, num_hidden_layers=1, **settings), pattern).eval()
    with pytest.warns(UserWarning, match="no branch of dilation rate 1"):
        expected = run(model, use_cache=False)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="eager", fullgraph=True), use_cache=False), expected)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"DilationPattern.parse"):
        longnet.use_dilated_attention(build("Llama"), "2048:1")
    with pytest.raises(TypeError, match="holds no PreTrainedModel"):
        longnet.use_dilated_attention(torch.nn.Linear(2, 2), BRANCHES)
    with pytest.raises(TypeError, match="SparseFixedPattern"):
        use_sparse_fixed_attention(build("Llama"), BRANCHES)


def visible_by_fixed_pattern(tokens, pattern):
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    own, summary = j // pattern.block == i // pattern.block, j % pattern.block >= pattern.block - pattern.summary
    return (j <= i) & (own | summary)


@pytest.mark.parametrize("family", CAUSAL)
def test_sparse_fixed_is_sdpa_with_its_mask(family, tmp_path):
    pattern = SparseFixedPattern(8, 2)
    sdpa = build(family)
    visible = visible_by_fixed_pattern(TOKENS, pattern)[None, None].expand(2, 1, -1, -1)
    expected = run(sdpa, attention_mask=visible)
    model = build(family)
    use_sparse_fixed_attention(model, pattern)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_fixed")
    torch.testing.assert_close(run(again), expected, atol=1e-5, rtol=0)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :9] = 0
    padded = run(model, attention_mask=mask, position_ids=positions_of(mask))
    alone = model(input_ids=tokens_of(2, TOKENS)[:1, 9:]).logits
    torch.testing.assert_close(padded[:1, 9:], alone, atol=1e-5, rtol=0)
    ways = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    ids = tokens_of(2, 13)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **ways)
    assert torch.equal(cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **ways))
    static = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **ways)
    assert torch.equal(cached, static)


def test_sparse_fixed_refuses_encoders():
    model = build("BERT")
    use_sparse_fixed_attention(model, SparseFixedPattern(8, 2))
    with pytest.raises(ValueError, match='attn_implementation="dilated"'):
        run(model)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_attention_weights_are_refused(family):
    model = dilated(build(family), ONE_BRANCH)
    inputs = {"input_ids": tokens_of(1, 9)} if FAMILIES[family].is_text else {"pixel_values": torch.zeros(1, 3, 24, 24)}
    for call in (model, model.forward):
        with pytest.raises(ValueError, match="output_attentions=True cannot be honoured"):
            call(**inputs, output_attentions=True)
    model(**inputs, output_hidden_states=True)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("Llama", {"attention_dropout": 0.1}),
        ("GPT-2", {"attn_pdrop": 0.1}),
        ("BERT", {"attention_probs_dropout_prob": 0.1}),
    ],
)
def test_attention_dropout_is_refused_in_training_alone(family, dropout):
    model = dilated(build(family, **dropout), ONE_BRANCH)
    run(model)
    with pytest.raises(ValueError, match=r"attention dropout of 0.1 cannot be honoured: load the model with"):
        run(model.train())


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "BERT", "ModernBERT"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions_are_refused(family, dtype):
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=dtype)
    with pytest.raises(ValueError, match="pass a 2-D padding mask"):
        run(dilated(build(family), ONE_BRANCH), attention_mask=mask)


def test_padding_with_gaps_is_refused():
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 7] = 0
    with pytest.raises(ValueError, match=r"side by side.*rows \[1\] have gaps"):
        run(dilated(build("Llama"), ONE_BRANCH), attention_mask=mask)


def test_a_sliding_window_is_refused_where_it_hides_something():
    sdpa = build("Mistral", sliding_window=TOKENS)
    model = dilated(sdpa, ONE_BRANCH)
    torch.testing.assert_close(run(model), run(sdpa), atol=1e-5, rtol=0)
    model = dilated(build("Mistral", sliding_window=TOKENS - 1), ONE_BRANCH)
    with pytest.raises(ValueError, match=r"sliding window or chunk of 36 over 37 tokens.*sliding_window=None"):
        run(model)
    with pytest.raises(ValueError, match="sliding window"):
        model.generate(tokens_of(1, 30), attention_mask=torch.ones(1, 30), max_new_tokens=9, min_new_tokens=9)


def test_modernbert_alternates_windows():
    sliding = {"layer_types": ["full_attention", "sliding_attention"]}
    sdpa = build("ModernBERT", local_attention=2 * TOKENS, **sliding)
    torch.testing.assert_close(run(dilated(sdpa, ONE_BRANCH)), run(sdpa), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="layer_types all 'full_attention'"):
        run(dilated(build("ModernBERT", local_attention=16, **sliding), ONE_BRANCH))


def test_softcap_is_refused():
    config = Gemma2Config(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match="attn_logit_softcapping=None"):
        run(dilated(Gemma2ForCausalLM(config).eval(), ONE_BRANCH))
    config.attn_logit_softcapping = None
    run(dilated(Gemma2ForCausalLM(config).eval(), ONE_BRANCH))


def test_an_encoder_decoder_is_refused_at_equal_lengths_too():
    config = BartConfig(
        vocab_size=101, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
    )  # fmt: skip
    model = dilated(BartForConditionalGeneration(config).eval(), ONE_BRANCH)
    for length in (20, 19):
        with pytest.raises(ValueError, match="encoder-decoder"):
            model(tokens_of(1, 20), decoder_input_ids=tokens_of(1, length))


def test_cu_seq_lens_that_differ_are_refused():
    q = torch.randn(1, 2, 5, 8)
    model = dilated(build("Llama"), ONE_BRANCH)
    edges, others = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 5])
    with pytest.raises(ValueError, match="cu_seq_lens_k, equal to it"):
        dilated_attention_forward(
            model.model.layers[0].self_attn, q, q, q, None, cu_seq_lens_q=edges, cu_seq_lens_k=others
        )


@pytest.mark.parametrize("keyword", ["position_bias", "cache", "block_table", "indices", "head_mask"])
def test_keywords_that_change_the_result_are_refused(keyword):
    q = torch.randn(1, 2, 5, 8)
    layer = build("Llama").model.layers[0].self_attn
    longnet.use_dilated_attention(build("Llama"), ONE_BRANCH)
    layer.config.segment_lengths, layer.config.dilation_rates = [8], [1]
    out, weights = dilated_attention_forward(layer, q, q, q, None)
    assert out.shape == (1, 5, 2, 8)
    assert weights is None
    with pytest.raises(ValueError, match="cannot be honoured"):
        dilated_attention_forward(layer, q, q, q, None, **{keyword: torch.zeros(1)})
    with pytest.raises(ValueError, match="positions are unknown"):
        dilated_attention_forward(layer, q[:, :, :2], q, q, None)
    with pytest.raises(ValueError, match="head dims that differ"):
        dilated_attention_forward(layer, q, q, q[..., :4], None)


def test_t5_is_refused():
    config = T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match=r"position bias|AttentionInterface"):  # noqa: PT012  # either refuses
        longnet.use_dilated_attention(model, ONE_BRANCH)
        model(input_ids=tokens_of(1, 9), labels=tokens_of(1, 9))


@pytest.mark.parametrize("length", [9, 11])
def test_cross_attention_is_refused(length):
    config = FAMILIES["GPT-2"].config(**FAMILIES["GPT-2"].settings, add_cross_attention=True)
    model = dilated(GPT2LMHeadModel(config).eval(), ONE_BRANCH)
    model(tokens_of(1, 9))
    with pytest.raises(ValueError, match="cross-attention"):
        model(tokens_of(1, 9), encoder_hidden_states=torch.zeros(1, length, 32))
    config = BertConfig(**FAMILIES["BERT"].settings, is_decoder=True, add_cross_attention=True)
    model = dilated(BertModel(config).eval(), ONE_BRANCH)
    with pytest.raises(ValueError, match="cross-attention"):
        model(tokens_of(1, 9), encoder_hidden_states=torch.zeros(1, length, 32))


def config_of(**settings):
    config = LlamaConfig(**settings)
    config._attn_implementation = "dilated"
    return config


def test_masks_that_are_no_documents_are_refused():
    embeddings = torch.zeros(1, 12, 4)
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1]])
    if "block_sequence_ids" in inspect.signature(create_causal_mask).parameters:  # from transformers 5.10 on
        with pytest.raises(ValueError, match="a bidirectional block of image tokens"):
            mask_of(create_causal_mask, config_of(), embeddings, block_sequence_ids=blocks)
        none = torch.full_like(blocks, -1)
        visible = mask_of(create_causal_mask, config_of(), embeddings, block_sequence_ids=none)
        assert visible.refusal is None

    def everything(*_):
        return torch.ones((), dtype=torch.bool)

    for make, keyword in ((create_causal_mask, "or_mask_function"), (create_bidirectional_mask, "and_mask_function")):
        visible = mask_of(make, config_of(), embeddings, **{keyword: everything})
        assert "custom mask function" in visible.refusal
    for size, refusal in ((11, "chunk of 11 over 12 tokens"), (12, None)):
        config = config_of(attention_chunk_size=size)
        chunked = mask_of(create_chunked_causal_mask, config, embeddings)
        assert chunked.refusal is None if refusal is None else refusal in chunked.refusal


def test_a_mask_is_read_once_and_returned_as_it_is():
    embeddings, mask = torch.zeros(2, 12, 4), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    visible = mask_of(create_causal_mask, config_of(), embeddings, mask)
    assert isinstance(visible, Visible)
    assert visible.bounds.tolist() == [[0, 0, 12], [1, 0, 8]]
    assert mask_of(create_causal_mask, config_of(), embeddings, visible) is visible


def test_opcheck_of_the_documents():
    before = torch.tensor([[False, True, True, False, True]])
    following = torch.zeros_like(before)
    whole = torch.ones_like(before)
    torch.library.opcheck(torch.ops.longnet.documents_seen, (before, following, whole, 5, False, True, True))
    found = torch.ops.longnet.documents_seen(before, following, whole, 5, False, True, False)
    assert found.tolist() == [[0, 0, 3], [0, 3, 5]]


def test_documents_are_read_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    visible = mask_of(create_causal_mask, config_of(), torch.zeros(2, 9, 4), position_ids=positions)
    assert visible.bounds.tolist() == [[0, 0, 3], [0, 3, 5], [0, 5, 9], [1, 0, 9]]


@pytest.mark.skipif(Version("5.3") > VERSION, reason="transformers < 5.3 has causal decoders only")
@pytest.mark.parametrize("by", ["config", "keyword"])
def test_a_decoder_made_bidirectional(by):
    sdpa = build("Llama")
    full = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    expected = run(sdpa, attention_mask=full)
    model = dilated(sdpa, ONE_BRANCH)
    keyword = {"is_causal": False} if by == "keyword" else {}
    if by == "config":
        model.config.is_causal = False
    torch.testing.assert_close(run(model, **keyword), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(model, is_causal=True), run(sdpa), atol=1e-5, rtol=0)


def test_a_model_that_does_not_let_its_attention_be_chosen():
    model = BloomForCausalLM(BloomConfig(vocab_size=101, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="BloomForCausalLM does not let its attention be chosen"):
        longnet.use_dilated_attention(model, ONE_BRANCH)


def test_cu_seq_lens_are_read_once_for_all_layers(monkeypatch):
    """Each reading waits for the device."""
    calls = []
    right = interface.document_bounds
    monkeypatch.setattr(interface, "document_bounds", lambda *given: calls.append(given) or right(*given))
    model = dilated(build("Llama"), BRANCHES)
    assert model.config.num_hidden_layers == 2
    for edges in ([0, 11, TOKENS], [0, 20, TOKENS]):
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens.clone(), "use_cache": False}
        positions = torch.cat([torch.arange(edges[1]), torch.arange(TOKENS - edges[1])])[None]
        out = model(input_ids=tokens_of(1, TOKENS), position_ids=positions, **packed).logits
        alone = model(input_ids=tokens_of(1, TOKENS)[:, edges[1] :], use_cache=False).logits
        torch.testing.assert_close(out[:, edges[1] :], alone)
    assert len(calls) == 2


def test_cu_seq_lens_beside_what_they_exclude():
    model = dilated(build("Llama"), ONE_BRANCH)
    edges = torch.tensor([0, 20, TOKENS], dtype=torch.int32)
    packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    with pytest.raises(ValueError, match="packs documents into one row"):
        run(model, **packed)
    ids = tokens_of(1, TOKENS)
    with pytest.raises(ValueError, match="an attention_mask beside cu_seq_lens"):
        model(ids, attention_mask=torch.ones_like(ids), **packed)
    with pytest.raises(ValueError, match="cu_seq_lens_q needs cu_seq_lens_k"):
        model(ids, cu_seq_lens_q=edges)
