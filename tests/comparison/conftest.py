import pytest

from corpora import write_words


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "bytes")


@pytest.fixture(scope="session")
def recipe_file(data_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(f"""
[data]
path = "{data_folder}"
[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
segment_lengths = [16, 64]
dilation_rates = [1, 4]
[optim]
lr = 3e-3
warmup_steps = 4
[train]
steps = 12
tokens = 64
batch_sequences = 4
log_every = 3
device = "cpu"
[evaluate]
tokens = 1024
[checkpoint]
every = 2
[compare]
attentions = ["sdpa", "dilated"]
lengths = [32, 64]
contexts = [32, 64, 128]
rounds = 2
""")
    return path
