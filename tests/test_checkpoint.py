"""Reading checkpoints: the description agrees with Hugging Face's, weights load right, bad input is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from graph_surgery.architectures import ARCHITECTURES, main
from graph_surgery.checkpoint import (
    DTYPES,
    CheckpointError,
    DecoderSpec,
    EncoderSpec,
    ModelSpec,
    copy_processor_files,
    load_model,
    load_spec,
)
from tests.checkpoints import CASES, random_checkpoint

BUNDLED = Path(__file__).parent.parent / "models" / "trocr-tiny-printed"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A checkpoint of the test's own, to spoil."""
    return shutil.copytree(checkpoint("small"), tmp_path / "spoiled")


def edit(file: Path, **changes) -> None:
    """Changes values of a JSON file; a dictionary changes values of that section, None removes."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            content[key].update(value)
        elif value is None:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def test_spec_of_the_bundled_checkpoint():
    assert load_spec(BUNDLED) == ModelSpec(
        name="trocr-tiny-printed",
        source=BUNDLED,
        encoder=EncoderSpec(
            model_type="deit",
            image_height=384,
            image_width=384,
            patch_height=16,
            patch_width=16,
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=768,
            hidden_act="gelu",
            qkv_bias=True,
            layer_norm_eps=1e-12,
        ),
        decoder=DecoderSpec(
            vocab_size=102,
            d_model=256,
            num_hidden_layers=6,
            num_attention_heads=8,
            decoder_ffn_dim=1024,
            activation_function="relu",
            max_position_embeddings=128,
            use_learned_position_embeddings=True,
            scale_embedding=True,
            layernorm_embedding=True,
            tie_word_embeddings=False,
        ),
        decoder_start_token_id=2,
        eos_token_ids=(2,),
        pad_token_id=1,
        bos_token_id=0,
        max_length=97,
    )
    assert load_spec(BUNDLED).encoder.num_tokens == 578
    assert load_spec(BUNDLED).decoder.head_dim == 32


@pytest.mark.parametrize("case", CASES)
def test_spec_agrees_with_the_model(checkpoint, case):
    spec = load_spec(checkpoint(case))
    model = load_model(spec)
    encoder, decoder = model.encoder, model.decoder.model.decoder
    assert spec.name == case
    assert spec.encoder.num_tokens == encoder.embeddings.position_embeddings.shape[1]
    assert spec.encoder.num_hidden_layers == len(encoder.layers)
    assert spec.encoder.head_dim == encoder.layers[0].attention.head_dim
    assert spec.encoder.qkv_bias == (encoder.layers[0].attention.q_proj.bias is not None)
    assert spec.decoder.vocab_size == model.decoder.output_projection.out_features
    assert spec.decoder.num_hidden_layers == len(decoder.layers)
    assert spec.decoder.head_dim == decoder.layers[0].self_attn.head_dim
    assert spec.decoder.layernorm_embedding == (decoder.layernorm_embedding is not None)
    assert spec.decoder.scale_embedding == (decoder.embed_tokens.embed_scale != 1)
    assert spec.decoder.use_learned_position_embeddings == isinstance(
        decoder.embed_positions, torch.nn.Embedding
    )
    assert spec.decoder.tie_word_embeddings == (
        model.decoder.output_projection.weight.data_ptr() == decoder.embed_tokens.weight.data_ptr()
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_architectures_have_the_published_sizes(name):
    """In millions of parameters, the pooler among them."""
    encoder, decoder = ARCHITECTURES[name]
    decoder = decoder | {"cross_attention_hidden_size": encoder["hidden_size"]}
    config = VisionEncoderDecoderConfig.from_dict({"encoder": dict(encoder), "decoder": decoder})
    with torch.device("meta"):
        model = VisionEncoderDecoderModel(config)
    millions = {
        "small": 61.6,
        "base": 334,
        "base-stage1": 385,
        "large": 558,
        "large-printed": 609,
        "chinese": 61.6 - 2 * (64044 - 11318) * 256 / 1e6,  # small's, with another vocabulary
    }
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(
        millions[name], rel=1e-3
    )


# Settings of generation in generation_config.json (None: no such file) and in config.json.
@pytest.mark.parametrize(
    ("generation", "config"),
    [
        pytest.param({}, {}, id="no length named"),
        pytest.param({"max_length": 9}, {}, id="max_length counts the start token"),
        pytest.param({"max_new_tokens": 9}, {}, id="max_new_tokens does not"),
        pytest.param({"max_new_tokens": 5, "max_length": 9}, {}, id="max_new_tokens goes first"),
        pytest.param({"decoder_start_token_id": 7}, {}, id="generation_config goes before config"),
        pytest.param(
            {"decoder_start_token_id": None, "bos_token_id": 8}, {}, id="bos starts where no start is"
        ),
        pytest.param({"eos_token_id": [2, 9]}, {}, id="several ends"),
        pytest.param({"pad_token_id": None}, {}, id="padding with the end"),
        pytest.param(None, {}, id="config.json alone"),
        pytest.param(None, {"decoder_start_token_id": 7, "max_length": 9}, id="length in config.json"),
        pytest.param(
            None,
            {
                "decoder_start_token_id": None,
                "decoder": {"decoder_start_token_id": 9, "max_length": 6, "pad_token_id": 5},
            },
            id="values in the decoder's section",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
def test_generation_settings_are_those_that_generate_uses(folder, generation, config):
    edit(folder / "config.json", **config)
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", **generation)
    spec = load_spec(folder)
    model = load_model(spec)
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    start = model.generation_config.decoder_start_token_id
    start = model.generation_config.bos_token_id if start is None else start
    ends = model.generation_config.eos_token_id
    assert spec.eos_token_ids == (tuple(ends) if isinstance(ends, list) else (ends,))
    assert spec.pad_token_id == (model.generation_config.pad_token_id or spec.eos_token_ids[0])
    # Without an end only the length ends a text.
    model.generation_config.eos_token_id = None
    sequences = model.generate(images)
    assert spec.decoder_start_token_id == start == sequences[0, 0]
    assert spec.max_length == sequences.shape[1]
    assert spec.max_new_tokens == sequences.shape[1] - 1


def test_length_is_limited_by_the_positions(folder):
    edit(folder / "generation_config.json", max_new_tokens=1000)
    spec = load_spec(folder)
    assert spec.decoder.max_position_embeddings == 24
    assert spec.max_new_tokens == 24


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", ["small", "base", "base-stage1"])
def test_model_is_loaded_for_inference_without_noise(checkpoint, case, precision, capfd):
    model = load_model(load_spec(checkpoint(case)), DTYPES[precision])
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {DTYPES[precision]}
    assert model.encoder.config._attn_implementation == "eager"
    assert model.encoder.pooler is None
    assert model.generation_config.use_cache and model.decoder.config.use_cache  # off in small's files
    tokens = torch.full((1, 3), 5)
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 48, 48, dtype=DTYPES[precision]), decoder_input_ids=tokens).logits
    assert logits.dtype == DTYPES[precision]
    assert logits.isfinite().all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("case", ["base-stage1", "small-inverted"])
def test_sinusoidal_positions_survive_loading(checkpoint, case):
    """Against a model that was built in memory, whose table Hugging Face's constructor computed."""
    spec = load_spec(checkpoint(case))
    loaded = load_model(spec)
    built = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_pretrained(spec.source)).eval()
    built.encoder.pooler = None
    built.load_state_dict(loaded.state_dict())
    images = torch.randn(2, 3, 48, 48)
    tokens = torch.randint(2, 120, (2, 24))
    with torch.no_grad():
        expected = built(images, decoder_input_ids=tokens).logits
        torch.testing.assert_close(loaded(images, decoder_input_ids=tokens).logits, expected)
    # The table goes where the model goes.
    assert loaded.to(torch.float64).decoder.model.decoder.embed_positions.weights.dtype == torch.float64


def test_sharded_weights(checkpoint, tmp_path):
    spec = load_spec(checkpoint("small"))
    model = load_model(spec)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert not (tmp_path / "model.safetensors").exists()
    sharded = load_model(load_spec(tmp_path))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[name], weight, rtol=0, atol=0)

    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard}.*fetch the checkpoint again"):
        load_model(load_spec(tmp_path))


def test_index_without_files(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match=r"index\.json names no files in weight_map; fetch it again"):
        load_model(load_spec(folder))


def test_processor_files_make_an_engine_folder_self_contained(checkpoint, tmp_path):
    spec = load_spec(checkpoint("wide"))
    copied = copy_processor_files(spec, tmp_path / "engines")
    assert {file.name for file in copied} == {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    engines = load_spec(tmp_path / "engines")
    assert (engines.encoder, engines.decoder, engines.max_length) == (
        spec.encoder,
        spec.decoder,
        spec.max_length,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "engines")
    text = "Total: 12.50 (GST 6%)"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    with pytest.raises(CheckpointError, match=r"engines has no weights.*model\.safetensors"):
        load_model(engines)


def test_hub_id_is_read_from_the_cache(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--trocr-small"
    shutil.copytree(checkpoint("small"), repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    spec = load_spec("somebody/trocr-small")
    assert spec.name == "trocr-small"
    assert spec.source == repository / "snapshots" / "0123abc"
    load_model(spec)


def test_hub_id_of_a_checkpoint_without_safetensors(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--trocr-small"
    snapshot = shutil.copytree(checkpoint("small"), repository / "snapshots" / "0123abc")
    weights = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    torch.save(weights, snapshot / "pytorch_model.bin")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    load_model(load_spec("somebody/trocr-small"))


def test_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no folder somebody/trocr-small.*hub.*local folder"):
        load_spec("somebody/trocr-small")


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent does not exist: give a folder"):
        load_spec(tmp_path / "absent")


def test_file_instead_of_folder(folder):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file: give the folder"):
        load_spec(folder / "model.safetensors")


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is empty: give a folder"):
        load_spec(tmp_path)


def test_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{folder} has no config\.json: give a folder"):
        load_spec(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"model_type": ', b"\xff\xfe", b"[]", b""])
def test_malformed_json(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{folder / name} .*JSON.*fetch it again"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r"model_type is 'bert', not 'vision-encoder-decoder'"),
        ({"model_type": None}, r"model_type is None, not 'vision-encoder-decoder'"),
        ({"encoder": {"model_type": "swin"}}, r"encoder\.model_type is 'swin', not 'vit' or 'deit'"),
        ({"decoder": {"model_type": "mbart"}}, r"decoder\.model_type is 'mbart', not 'trocr'"),
        ({"decoder": None}, r"decoder\.model_type is None, not 'trocr'"),
        ({"encoder": "vit"}, r"encoder\.model_type is None, not 'vit' or 'deit'"),
    ],
)
def test_other_architectures(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}; only TrOCR"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"num_hidden_layers": "twelve"}}, r"num_hidden_layers.*correct the value"),
        ({"decoder": {"decoder_attention_heads": 5}}, r"decoder of width 192 .* 5 attention heads"),
        ({"encoder": {"num_attention_heads": 0}}, r"encoder\.num_attention_heads is 0, and sizes begin at 1"),
        ({"encoder": {"patch_size": 0}}, r"encoder\.patch_size is 0, and sizes begin at 1"),
        ({"encoder": {"image_size": [48, 48, 3]}}, r"encoder\.image_size is .48, 48, 3., and sizes"),
        ({"encoder": {"image_size": [48, 0]}}, r"encoder\.image_size is .48, 0., and sizes"),
        ({"decoder": {"decoder_layers": -1}}, r"decoder\.decoder_layers is -1, and sizes begin at 1"),
        ({"encoder": {"num_attention_heads": 3}}, r"encoder of width 128 .* 3 attention heads"),
        ({"encoder": {"num_channels": 1}}, r"encoder\.num_channels is 1; only 3"),
        ({"encoder": {"hidden_act": "relu"}}, r"encoder\.hidden_act is 'relu', not 'gelu'; no TrOCR"),
        (
            {"decoder": {"activation_function": "silu"}},
            r"decoder\.activation_function is 'silu', not 'gelu' or 'relu'; no TrOCR",
        ),
        ({"decoder": {"is_decoder": False}}, r"decoder\.is_decoder is false.*set it to true"),
        (
            {"decoder": {"cross_attention_hidden_size": 64}},
            r"decoder\.cross_attention_hidden_size is 64, encoder\.hidden_size is 128; they must agree",
        ),
    ],
)
def test_configuration_values(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"(?s)config\.json: .*{message}"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": None}, r"names no eos_token_id: add it to generation_config\.json"),
        ({"decoder_start_token_id": None, "bos_token_id": None}, r"names no decoder_start_token_id: add it"),
        ({"decoder_start_token_id": 5000}, r"decoder_start_token_id is 5000, and .* of 120 tokens"),
        ({"decoder_start_token_id": "<s>"}, r"decoder_start_token_id is '<s>', and config\.json"),
        ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>', and config\.json"),
        ({"eos_token_id": []}, r"eos_token_id is \[\], and config\.json"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\], and config\.json"),
        ({"pad_token_id": 120}, r"pad_token_id is 120, and config\.json"),
        ({"max_length": 1}, r"max_length is 1, and a text has at least"),
        ({"max_length": "long"}, r"max_length is 'long', and a text has at least"),
        ({"max_new_tokens": -1}, r"(?s)generation_config\.json: .*max_new_tokens.*correct the value"),
    ],
)
def test_generation_values(folder, changes, message):
    edit(folder / "generation_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_spec(folder)


def test_missing_weights_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"{folder} has no weights: model\.safetensors or .* is missing; fetch"
    ):
        load_model(load_spec(folder))


@pytest.mark.parametrize("case", ["small", "base", "base-stage1"])
@pytest.mark.parametrize("form", ["one file", "shards", "before PyTorch 1.6"])
def test_pickled_weights(checkpoint, tmp_path, case, form):
    """The files that transformers wrote before safetensors: old names, and tied weights twice."""
    weights = load_file(checkpoint(case) / "model.safetensors")
    folder = shutil.copytree(checkpoint(case), tmp_path / "pickled", ignore=lambda *_: ["model.safetensors"])
    assert "encoder.encoder.layer.0.attention.attention.query.weight" in weights
    if form == "shards":
        names = sorted(weights)
        shards = {
            "pytorch_model-00001-of-00002.bin": names[::2],
            "pytorch_model-00002-of-00002.bin": names[1::2],
        }
        for file, part in shards.items():
            torch.save({name: weights[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        zipped = form == "one file"
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_weights(load_model(load_spec(folder)), load_model(load_spec(checkpoint(case))))


def assert_same_weights(model, expected) -> None:
    expected = expected.state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("case", ["small", "base", "base-stage1"])
def test_names_of_transformers_5(checkpoint, tmp_path, case, suffix):
    """A state dictionary saved as it is has the modules' new names."""
    expected = load_model(load_spec(checkpoint(case)))
    folder = shutil.copytree(checkpoint(case), tmp_path / "new", ignore=lambda *_: ["model.safetensors"])
    weights = {name: weight.clone() for name, weight in expected.state_dict().items()}
    assert "encoder.layers.0.attention.q_proj.weight" in weights
    if suffix == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load_model(load_spec(folder)), expected)


def test_weights_that_are_computed_or_not_used_may_be_there(folder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.pooler.dense.weight"] = torch.zeros(128, 128)
    weights["decoder.model.decoder.embed_positions._float_tensor"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(load_spec(folder))


class Malicious:
    def __reduce__(self):
        return print, ("code of the checkpoint was run",)


def test_code_in_pickled_weights_is_not_run(folder, capfd):
    (folder / "model.safetensors").unlink()
    torch.save({"encoder": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin .*code of a checkpoint is never run; fetch"
    ):
        load_model(load_spec(folder))
    assert "was run" not in capfd.readouterr().out


def test_pickle_of_something_else(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"weight": torch.zeros(3)}, "epoch": 7}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds something else .*save_pretrained"):
        load_model(load_spec(folder))


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_pickled_weights(folder, keep):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{file} is .*damaged.*fetch"):
        load_model(load_spec(folder))


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{file} is missing, truncated or damaged .*; fetch"):
        load_model(load_spec(folder))


def test_damaged_header(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8] = ord("?")  # the JSON's opening brace
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} is missing, truncated or damaged"):
        load_model(load_spec(folder))


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", decoder={"decoder_ffn_dim": 512})
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.fc1\.bias has shape \[320\], config\.json asks for \[512\]"
    ):
        load_model(load_spec(folder))


def test_weights_of_fewer_layers(folder):
    edit(folder / "config.json", decoder={"decoder_layers": 3})
    with pytest.raises(
        CheckpointError, match=r"26 weights are not in model\.safetensors, the first is .*layers\.2\."
    ):
        load_model(load_spec(folder))


@pytest.mark.parametrize(
    "changes", [{"encoder": {"num_hidden_layers": 1}}, {"decoder": {"decoder_layers": 1}}]
)
def test_weights_of_more_layers(folder, changes):
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"has no place for \d+ weights of .*layers?\.1\."):
        load_model(load_spec(folder))


def test_a_weight_is_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.output_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights .*decoder\.output_projection\.weight"):
        load_model(load_spec(folder))


def test_random_checkpoints_repeat_by_seed(tmp_path):
    first, second, third = (
        load_file(random_checkpoint("base", tmp_path / run, seed=seed) / "model.safetensors")
        for run, seed in (("first", 1), ("second", 1), ("third", 2))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)


def test_command_writes_a_full_size_checkpoint(tmp_path, capsys):
    assert main(["small", "--out", str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "small")
    spec = load_spec(tmp_path / "small")
    assert (spec.encoder.num_tokens, spec.decoder.vocab_size) == (578, 64044)
    assert GenerationConfig.from_pretrained(tmp_path / "small").use_cache is False  # as published
    weights = load_file(tmp_path / "small" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert all(weight.isfinite().all() for weight in weights.values())
