"""The device decoder alone: correctness and time a token of the published decoders, in one run.

    python -m profiling.device_decoder [--models small,base] [--batches 1,8,16,64] [--tokens 20] [--out FILE]

Weights and encoder keys and values are random. Every text has exactly `--tokens` tokens: no id ends it. Times
are medians of whole searches, from enqueueing to the end on the GPU. The byte floor is every weight and every
key and value once, 2 [L (6 D^2 + 2 D F) + V D] + B 4 L D (S + t) bytes a step (`rates.decoder_bytes`), at
4.5 TB/s, an H200's, on any GPU. `runtime.bench` takes the same bytes at the bandwidth that it measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from profiling.rates import decoder_bytes
from profiling.reference_decoder import forced_logits
from runtime.device_decoder import STATE_ROWS, DeviceDecoder
from runtime.kernels import load_kernels

BANDWIDTH = 4.5e12  # bytes a second, an H200's
NO_END = 2**31 - 1  # a token id that no decoder has

SMALL = {
    "num_layers": 6,
    "hidden_size": 256,
    "num_heads": 8,
    "ffn_size": 1024,
    "vocab_size": 64044,
    "source_length": 578,
    "max_positions": 512,
    "activation": "relu",
    "embed_scale": 16.0,
    "epsilon": 1e-5,
    "start_id": 2,
    "pad_id": 1,
    "eos_id": NO_END,
    "embedding_norm": 1,
}
DECODERS = {
    "bundled": SMALL | {"vocab_size": 102},
    "small": SMALL,
    "base": SMALL  # large's decoder is the same
    | {
        "num_layers": 12,
        "hidden_size": 1024,
        "num_heads": 16,
        "ffn_size": 4096,
        "vocab_size": 50265,
        "source_length": 577,
        "encoder_size": 768,
        "activation": "gelu",
        "embed_scale": 1.0,
    },
}


def random_weights(config: Mapping, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Weights as `pack_decoder` makes them. Activations stay near 1 and logits differ clearly."""
    layers, width, inner = config["num_layers"], config["hidden_size"], config["ffn_size"]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def bias(*shape: int) -> Tensor:
        return normal(*shape, scale=0.1).float()

    wide, narrow = width**-0.5, inner**-0.5
    weights = {
        "token_embedding": normal(config["vocab_size"], width, scale=1.0 / config["embed_scale"]),
        "position_embedding": normal(config["max_positions"], width, scale=0.3),
        "self_qkv_weight": normal(layers, 3 * width, width, scale=wide),
        "self_qkv_bias": bias(layers, 3 * width),
        "self_out_weight": normal(layers, width, width, scale=wide),
        "self_out_bias": bias(layers, width),
        "cross_query_weight": normal(layers, width, width, scale=wide),
        "cross_query_bias": bias(layers, width),
        "cross_out_weight": normal(layers, width, width, scale=wide),
        "cross_out_bias": bias(layers, width),
        "fc1_weight": normal(layers, inner, width, scale=wide),
        "fc1_bias": bias(layers, inner),
        "fc2_weight": normal(layers, inner, width, scale=narrow),
        "fc2_bias": bias(layers, width),
        "norm_gamma": 1 + normal(layers, 3, width, scale=0.1),
        "norm_beta": normal(layers, 3, width, scale=0.1),
        "head_weight": normal(config["vocab_size"], width, scale=4 * wide),
    }
    if encoded := config.get("encoder_size"):
        weights["cross_key_weight"] = normal(layers, width, encoded, scale=encoded**-0.5)
        weights["cross_value_weight"] = normal(layers, width, encoded, scale=encoded**-0.5)
        weights["cross_value_bias"] = bias(layers, width)
    if config["embedding_norm"]:
        weights["embedding_norm_gamma"] = 1 + normal(width, scale=0.1)
        weights["embedding_norm_beta"] = normal(width, scale=0.1)
    return weights


def random_cross(
    config: Mapping, lines: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer, T [lines, H, S, d]."""
    heads = config["num_heads"]
    shape = (lines, heads, config["source_length"], config["hidden_size"] // heads)
    generator = torch.Generator(device).manual_seed(seed)
    keys, values = (
        [
            torch.randn(shape, generator=generator, device=device, dtype=dtype)
            for _ in range(config["num_layers"])
        ]
        for _ in range(2)
    )
    return keys, values


def random_states(config: Mapping, lines: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """States of the encoder, T [lines, S, E]."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = lines, config["source_length"], config["encoder_size"]
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def cross_of_states(
    weights: Mapping[str, Tensor], config: Mapping, states: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer, as `random_cross` makes them, of the encoder's states; in float32."""

    def by_heads(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (
            F.linear(states.float(), weight.float(), bias)
            .unflatten(-1, (config["num_heads"], -1))
            .transpose(1, 2)
        )

    keys = [by_heads(weight) for weight in weights["cross_key_weight"]]
    values = [
        by_heads(weight, bias)
        for weight, bias in zip(weights["cross_value_weight"], weights["cross_value_bias"], strict=True)
    ]
    return keys, values


def differences(
    weights: Mapping[str, Tensor],
    config: Mapping,
    cross: tuple[list[Tensor], list[Tensor]],
    outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[list[str], float]:
    """What is wrong with a search's outputs, and the largest error of a line's log-probability, a token.

    The search's own tokens are given to a PyTorch decoder in float32, and in the weights' type: every token
    must have been the best, but for what PyTorch's own rounding may do twice over.
    """
    tokens, log_probs, lengths = outputs
    start = torch.full_like(tokens[:, :1], config["start_id"])
    # Padding may be no token of this vocabulary; what follows it is not looked at.
    inputs = torch.cat([start, tokens[:, :-1]], 1).clamp(0, config["vocab_size"] - 1)
    exact = forced_logits(weights, config, *cross, inputs)
    rounded = forced_logits(weights, config, *cross, inputs, dtype=weights["head_weight"].dtype).float()
    margin = 2 * (rounded - exact).abs().max() + 1e-3
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    valid = steps < lengths[:, None]
    chosen = tokens.clamp(0, config["vocab_size"] - 1).long()[..., None]
    lag = exact.amax(-1) - exact.gather(-1, chosen)[..., 0]
    found = [
        f"line {line}, step {step}: token {tokens[line, step]} is {lag[line, step]:.3g} below the best, "
        f"more than {margin:.3g}"
        for line, step in ((valid & ~(lag <= margin)).nonzero()).tolist()
    ]
    if (tokens[~valid] != config["pad_id"]).any():
        found.append("what follows a line's end is not all padding")
    expected = (exact.log_softmax(-1).gather(-1, chosen)[..., 0] * valid).sum(1)
    error = ((log_probs - expected).abs() / lengths).max().item()
    if not error <= 2 * margin.item():
        found.append(f"a line's log-probability is {error:.3g} a token off (margin {margin:.3g})")
    return found, error


def step_bytes(config: Mapping, lines: int, tokens: int) -> float:
    """`rates.decoder_bytes` of a decoder of DECODERS, in numbers of two bytes."""
    return decoder_bytes(
        layers=config["num_layers"],
        width=config["hidden_size"],
        inner=config["ffn_size"],
        vocabulary=config["vocab_size"],
        source=config["source_length"],
        lines=lines,
        tokens=tokens,
    )


def floor_microseconds(config: Mapping, lines: int, tokens: int) -> float:
    """The least time of a token: its bytes at BANDWIDTH."""
    return step_bytes(config, lines, tokens) / BANDWIDTH * 1e6


def search_microseconds(run, repeats: int = 15) -> float:
    """Median time of a search on the GPU."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[3:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", default="bundled,small,base")
    parser.add_argument("--batches", default="1,8,16,64")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU; the decoder runs on one only", file=sys.stderr)
        return 2
    kernels = load_kernels()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_stream(torch.cuda.Stream())
    dtype = getattr(torch, options.dtype)
    rows, wrong = [], []
    for name in options.models.split(","):
        config = DECODERS[name] | {"dtype": options.dtype}
        weights = random_weights(config, dtype, "cuda")
        batches = [int(batch) for batch in options.batches.split(",")]
        decoder = DeviceDecoder(kernels, weights, config, max(batches), options.tokens)
        for batch in batches:
            for attends_to in ("states", "keys and values"):
                outputs = decoder.outputs(batch, options.tokens)
                if attends_to == "keys and values":
                    attended = cross = random_cross(config, batch, dtype, "cuda", seed=batch)
                elif decoder.attends_to_states and batch <= STATE_ROWS:
                    attended = random_states(config, batch, dtype, "cuda", seed=batch)
                    cross = cross_of_states(weights, config, attended)
                else:
                    continue
                time = search_microseconds(partial(decoder.run, attended, outputs)) / options.tokens
                found, error = differences(weights, config, cross, outputs)
                floor = floor_microseconds(config, batch, options.tokens)
                wrong += [f"{name}, batch {batch}, {attends_to}: {text}" for text in found]
                rows.append(
                    {
                        "decoder": name,
                        "attends_to": attends_to,
                        "batch": batch,
                        "tokens": options.tokens,
                        "dtype": options.dtype,
                        "us_per_token": round(time, 1),
                        "floor_us": round(floor, 1),
                        "of_floor": round(floor / time, 3),
                        "log_prob_error": float(f"{error:.2g}"),
                        "right": not found,
                    }
                )
                print(rows[-1], flush=True)
    print(f"{torch.cuda.get_device_name()}, no early end")
    print(tabulate(rows, headers="keys", tablefmt="github"))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for text in wrong[:20]:
        print(f"WRONG {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
