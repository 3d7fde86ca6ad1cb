"""The packed weights: a plain decoder on them is Hugging Face's decoder, and the file gives them back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graph_surgery.checkpoint import load_model, load_spec
from graph_surgery.export import CrossKeyValue
from profiling.reference_decoder import forced_logits, greedy_reference
from runtime.decoder_weights import (
    FILE_NAME,
    DecoderWeightsError,
    decoder_config,
    load_decoder,
    obstacle,
    pack_decoder,
    save_decoder,
)
from tests.checkpoints import CASES

TOKENS = 16


def encode(spec, model) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Random pixels [3, 3, height, width], and each layer's cross-attention keys and values of them."""
    shape = (3, 3, spec.encoder.image_height, spec.encoder.image_width)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        states = model.encoder(pixel_values=pixels).last_hidden_state
        cross = CrossKeyValue(spec, model)(states)
    return pixels, cross[0::2], cross[1::2]


@pytest.mark.parametrize("case", CASES)
def test_a_plain_decoder_on_them_is_that_of_hugging_face(case: str, checkpoint: Callable[[str], Path]):
    spec = load_spec(checkpoint(case))
    model = load_model(spec)
    pixels, keys, values = encode(spec, model)
    weights, config = pack_decoder(model), decoder_config(spec, model)

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(spec.decoder.vocab_size, (len(pixels), TOKENS), generator=generator)
    with torch.no_grad():
        expected = model(pixel_values=pixels, decoder_input_ids=ids).logits
    found = forced_logits(weights, config, keys, values, ids)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()

    settings = {
        "max_new_tokens": TOKENS,
        "pad_token_id": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    free = model.generate(pixels, eos_token_id=spec.decoder.vocab_size, **settings).sequences
    ends = sorted({free[0, 5].item(), free[1, 8].item()})
    generated = model.generate(pixels, eos_token_id=ends, **settings)
    config = decoder_config(replace(spec, eos_token_ids=tuple(ends)), model)
    tokens, log_probs = greedy_reference(weights, config, keys, values, TOKENS)
    steps = generated.sequences.shape[1] - 1
    assert torch.equal(tokens[:, :steps].long(), generated.sequences[:, 1:])
    assert (tokens[:, steps:] == 1).all()
    scores = torch.stack(generated.logits, 1).log_softmax(-1)
    scores = scores.gather(2, tokens[:, :steps, None].long())[..., 0]
    ended = torch.isin(generated.sequences[:, 1:], torch.tensor(ends)).int()
    after_end = ended.cumsum(1) - ended > 0
    torch.testing.assert_close(log_probs, scores.masked_fill(after_end, 0).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["small", "base", "large-printed"])
def test_the_file_gives_them_back(
    case: str, dtype: torch.dtype, checkpoint: Callable[[str], Path], tmp_path: Path
):
    spec = load_spec(checkpoint(case))
    model = load_model(spec, dtype)
    weights, config = pack_decoder(model), decoder_config(spec, model)
    file = save_decoder(weights, config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    loaded, loaded_config = load_decoder(tmp_path)
    assert loaded_config == config
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
        assert tensor.dtype == (torch.float32 if name.endswith("_bias") else dtype), name

    layers, width, ffn = config["num_layers"], config["hidden_size"], config["ffn_size"]
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    assert shapes["self_qkv_weight"] == (layers, 3 * width, width)
    assert shapes["fc1_weight"] == shapes["fc2_weight"] == (layers, ffn, width)
    assert shapes["norm_gamma"] == (layers, 3, width)
    assert shapes["position_embedding"] == (config["max_positions"], width)
    assert ("embedding_norm_gamma" in shapes) == bool(config["embedding_norm"])
    tied = loaded["head_weight"].data_ptr() == loaded["token_embedding"].data_ptr()
    assert tied == spec.decoder.tie_word_embeddings
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert file.stat().st_size < 2e6


def test_what_the_decoder_cannot_run_is_named(checkpoint: Callable[[str], Path]):
    spec = load_spec(checkpoint("small"))
    assert obstacle(spec, torch.float16) is None
    assert "not in float32" in obstacle(spec, torch.float32)
    other = replace(spec, decoder=replace(spec.decoder, activation_function="silu"))
    assert "not silu" in obstacle(other, torch.bfloat16)


def test_missing_and_damaged_files(checkpoint: Callable[[str], Path], tmp_path: Path):
    with pytest.raises(DecoderWeightsError, match=f"{FILE_NAME} is missing or damaged .*build.py --force"):
        load_decoder(tmp_path)
    spec = load_spec(checkpoint("small"))
    model = load_model(spec, torch.float16)
    file = save_decoder(pack_decoder(model), decoder_config(spec, model), tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DecoderWeightsError, match=f"{FILE_NAME} is missing or damaged"):
        load_decoder(tmp_path)
