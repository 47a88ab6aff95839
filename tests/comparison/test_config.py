import dataclasses

import pytest

from longnet import LongNetConfig
from longnet.attention.pattern import DilationPattern
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.cli.recipe import load_recipe
from longnet.comparison.config import Cell, CompareConfig, ComparisonRecipe
from longnet.comparison.recall import RecallConfig
from longnet.comparison.systems import matching_pattern
from longnet.data.shards import TokenData
from longnet.model.cost import attention_flops
from longnet.model.patterns import sparse_pattern_of
from longnet.training.config import DataConfig, TrainConfig


def load(path, *overrides):
    return load_recipe(path, overrides, kind=ComparisonRecipe)


def test_every_cell_has_the_same_model_and_tokens_a_step(recipe_file, data_folder):
    recipe = load(recipe_file, "--train.accumulate", "2", "--train.batch_sequences", "8")
    data = TokenData.open(data_folder)
    assert [cell.name for cell in recipe.all_cells] == ["sdpa-32", "sdpa-64", "dilated-32", "dilated-64"]
    settings = [recipe.for_cell(cell, data) for cell in recipe.all_cells]
    assert {one.train.tokens * one.train.batch_sequences for one in settings} == {512}
    assert {(one.train.tokens, one.train.batch_sequences, one.train.accumulate) for one in settings} == {
        (32, 16, 2), (64, 8, 2),
    }  # fmt: skip
    configs = [one.model_config(data).to_dict() for one in settings]
    assert all(config == configs[0] for config in configs)
    assert configs[0]["max_position_embeddings"] == 128  # the longest context: xPos is placed alike everywhere
    assert [one.model.attention for one in settings] == ["sdpa", "sdpa", "dilated", "dilated"]


def test_a_forward_pass_of_a_longer_cell_has_no_more_tokens_where_that_can_be(recipe_file, data_folder):
    recipe = load(recipe_file, "--train.accumulate", "4", "--compare.lengths", "32", "128", "256")
    data = TokenData.open(data_folder)
    parts = {cell.length: recipe.for_cell(cell, data).train.accumulate for cell in recipe.all_cells}
    assert parts == {32: 4, 128: 2, 256: 1}  # one sequence at the least


@pytest.mark.parametrize(("tokens", "within"), [(64, 0.2), (256, 0.2), (2048, 0.2)])
def test_the_fixed_pattern_costs_what_the_dilated_one_does(recipe_file, data_folder, tokens, within):
    recipe = load(recipe_file, "--compare.lengths", str(tokens), "--train.batch_sequences", "32")
    data = TokenData.open(data_folder)
    config = recipe.for_cell(Cell("sparse_fixed", tokens), data).model_config(data)
    sizes = {"tokens": tokens, "num_heads": 2, "head_dim": 8}
    dilated = config.pattern.flops(**sizes, is_causal=True)
    assert sparse_pattern_of(config).flops(**sizes) == pytest.approx(dilated, rel=within)


def test_the_fixed_pattern_of_the_papers_sizes_is_the_papers():
    config = LongNetConfig()  # block 2048, FLOPs matched
    for tokens in (8192, 16384, 32768):
        found = matching_pattern(config, tokens, None)
        assert found == SparseFixedPattern.matching(config.pattern, tokens=tokens, num_kv_heads=12)


@pytest.mark.parametrize("tokens", [64, 256, 2048])
def test_the_window_costs_what_the_dilated_pattern_does_and_a_pattern_is_a_system(recipe_file, data_folder, tokens):
    systems = ["window", "16:1,64:4;all", "dilated"]
    overrides = ["--compare.attentions", *systems, "--compare.lengths", str(tokens), "--train.batch_sequences", "32"]
    recipe, data = load(recipe_file, *overrides), TokenData.open(data_folder)
    assert [cell.name for cell in recipe.all_cells] == [
        f"{name}-{tokens}" for name in ("window", "16x1_64x4-all", "dilated")
    ]
    window, chosen, dilated = (recipe.for_cell(cell, data).model_config(data) for cell in recipe.all_cells)
    assert len(window.segment_lengths) == 1
    assert window.dilation_rates == (1,)
    assert attention_flops(window, tokens=tokens) == pytest.approx(attention_flops(dilated, tokens=tokens), rel=0.05)
    for size in (window.segment_lengths[0] - 1, window.segment_lengths[0] + 1):  # none comes nearer
        other = DilationPattern((size,), (1,)).flops(tokens=tokens, num_heads=2, head_dim=8, is_causal=True)
        wanted = attention_flops(dilated, tokens=tokens)
        assert abs(other - wanted) >= abs(attention_flops(window, tokens=tokens) - wanted)
    assert str(chosen.pattern) == "16:1,64:4;all"
    assert str(dilated.pattern) == "16:1,64:4"


def test_a_system_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"compare.attentions must be 'sdpa', 'window', .*, got 'sdpq'"):
        CompareConfig(attentions=("sdpq",))
    with pytest.raises(ValueError, match="got '64:1,64:1': a branch is given twice"):
        RecallConfig(systems=("64:1,64:1",))
    with pytest.raises(ValueError, match="got '64:1,128:4;shift=3': a model shifts offsets by layer"):
        RecallConfig(systems=("64:1,128:4;shift=3",))


def test_a_system_has_global_tokens_of_its_own(recipe_file, data_folder):
    overrides = ["--model.global_tokens", "3", "--compare.lengths", "64", "--compare.attentions"]
    recipe = load(recipe_file, *overrides, "16:1,64:4;global=1", "16:1,64:4", "dilated", "window")
    data = TokenData.open(data_folder)
    configs = [recipe.for_cell(cell, data).model_config(data) for cell in recipe.all_cells]
    assert [config.global_tokens for config in configs] == [1, 0, 3, 0]


def test_cells_can_be_chosen(recipe_file):
    assert load(recipe_file, "--compare.cells", "dilated-64").all_cells == [Cell("dilated", 64)]
    assert Cell("dilated", 2048).title == "LongNet, 2K"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--compare.cells", "dense-64"], "there is no cell 'dense-64'; there are sdpa-32, sdpa-64"),
        (["--compare.lengths", "48"], "a step has .* = 256 tokens, which is no multiple of 48"),
    ],
)
def test_cells_that_cannot_be_are_refused(recipe_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(recipe_file, *overrides).all_cells  # noqa: B018


def test_values_out_of_range_are_refused():
    for values in ({"lengths": ()}, {"lengths": (8, 8)}, {"lengths": (0,)}, {"rounds": -1}, {"sparse_block": 0}):
        with pytest.raises(ValueError, match=r"compare\."):
            CompareConfig(**values)


def test_where_no_fixed_pattern_fits_it_is_said(tmp_path, data_folder):
    # Two branches over the same 32 tokens cost more than attending to all of them.
    recipe = ComparisonRecipe(data=DataConfig(path=data_folder), train=TrainConfig(tokens=32))
    model = dataclasses.replace(recipe.model, preset="tiny", segment_lengths=(32, 64), dilation_rates=(1, 2))
    recipe = dataclasses.replace(recipe, model=model, compare=CompareConfig(lengths=(32,)))
    with pytest.raises(ValueError, match="no fixed pattern of blocks of up to 32 tokens costs within a fifth"):
        recipe.for_cell(Cell("sparse_fixed", 32), TokenData.open(data_folder))
